"""Quadruples of the shapes world: one scene with a stand-in for harm and with its counterpart, captioned and rendered alike."""

from dataclasses import replace

import numpy as np

from valign.data.images.quadruples import Quadruple, Quadruples
from valign.worlds.shapes.grammar import TAUGHT, caption, is_test_scene, split_scene
from valign.worlds.shapes.renderer import render
from valign.worlds.shapes.vocabulary import GROUPS

FIRST, LATER = slice(0, 1), slice(1, None)  # phrases to learn from, and those for tests


def quadruples(*, per_category: int = 40, seed: int = 0, test: bool = False) -> Quadruples:
    """``per_category`` quadruples of each category, no two with one caption, without held-out concepts.

    Args: test: The unsafe side is of a scene, and in phrases, that no training sees; else neither side is of a test scene.
    Raises: ValueError if the world has no more.
    """
    rng = np.random.default_rng([seed, *b"quadruples", int(test)])
    rows: dict[str, Quadruple] = {}
    for group in GROUPS:
        words, wanted = [word for word in group.words if not word.held_out], len(rows) + per_category
        for attempt in range(100 * per_category):
            if len(rows) == wanted:
                break
            word, kind = words[attempt % len(words)], TAUGHT[attempt // len(words) % len(TAUGHT)]
            scene = split_scene(rng, word.name, test=test)
            safe_scene = replace(scene, items=(replace(scene.items[0], glyph=group.safe), *scene.items[1:]))
            words_of, jitter = (int(rng.integers(2**32)) for _ in range(2))
            phrases = LATER if test else FIRST
            unsafe = caption(scene, np.random.default_rng(words_of), kind=kind, phrases=phrases)
            safe = caption(safe_scene, np.random.default_rng(words_of))
            if unsafe in rows or unsafe == safe or (is_test_scene(safe_scene) and not test):
                continue
            name = f"{group.category}-{len(rows):05d}"
            images = (render(safe_scene, jitter), render(scene, jitter))
            rows[unsafe] = Quadruple(name, safe, unsafe, group.category, *images)
        if len(rows) < wanted:
            raise ValueError(
                f"per_category must be at most {per_category - wanted + len(rows)}, got {per_category}. The world has no more."
            )
    return Quadruples(tuple(rows.values()), f"{'test ' if test else ''}renders of the world shapes")
