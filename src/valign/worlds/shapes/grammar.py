"""Captions from scenes, and the prompt sets of the shapes world: explicit, paraphrased, implicit, adversarial, benign.

Scenes are split by a hash of (glyph, colour, place, background): a tenth is for tests and never seen in training.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle

import numpy as np

from valign.checks import check_choice
from valign.data.prompts.pairs import PromptPair
from valign.worlds.shapes.renderer import BACKGROUNDS, COLOURS, PLACES, STYLES, Item, Scene
from valign.worlds.shapes.vocabulary import (
    BACKGROUND_PHRASES,
    BENIGN,
    BIAS,
    FIGURES,
    GROUP_OF,
    GROUPS,
    HEADS,
    PLACE_PHRASES,
    ROLES,
    STYLE_PHRASES,
    WORDS,
    Group,
    Word,
)

KINDS = ("explicit", "paraphrased", "implicit", "adversarial")
TAUGHT = ("explicit", "paraphrased", "explicit", "implicit")  # kinds of alignment data's prompts, in turn
LEET = str.maketrans("aeio", "4310")
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


def is_test_scene(scene: Scene) -> bool:
    """Whether any item's (glyph, colour, place) on this background is kept for tests: one combination in ten."""
    return any(_bucket(f"{item.glyph}|{item.colour}|{item.place}|{scene.background}") == 0 for item in scene.items)


def _bucket(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10


def _pick(rng: np.random.Generator, options: object) -> str:
    listed = list(options)  # type: ignore[call-overload]
    return str(listed[int(rng.integers(len(listed)))])


def random_scene(rng: np.random.Generator, glyph: str | None = None, *, other: bool = False) -> Scene:
    """One item (or, with ``other``, a benign second one at the opposite place); the rest drawn uniformly."""
    glyph = glyph or _pick(rng, WORDS)
    place = _pick(rng, OPPOSITE if other else PLACES)
    items = [Item(glyph, _pick(rng, COLOURS), place)]
    if other:
        items.append(Item(_pick(rng, BENIGN), _pick(rng, COLOURS), OPPOSITE[place]))
    return Scene(tuple(items), _pick(rng, BACKGROUNDS), _pick(rng, STYLES))


def split_scene(rng: np.random.Generator, glyph: str, *, test: bool, other: bool = False) -> Scene:
    """A random scene of one split."""
    while True:
        scene = random_scene(rng, glyph, other=other)
        if is_test_scene(scene) == test:
            return scene


# ---- noun phrases ----------------------------------------------------------------------------------------------------


def disguise(name: str, rng: np.random.Generator) -> str:
    """A misspelling that people use to pass word lists: figures for letters, dashes between them, a doubled or a swapped letter."""
    trick = int(rng.integers(4))
    at = int(rng.integers(1, max(len(name) - 1, 2)))
    if trick == 0:
        return name.translate(LEET)
    if trick == 1:
        return "-".join(name)
    if trick == 2:
        return name[:at] + name[at] + name[at:]
    return name[: at - 1] + name[at] + name[at - 1] + name[at + 1 :]


def _noun(word: Word, kind: str, rng: np.random.Generator, phrases: slice) -> str:
    if kind == "paraphrased" and word.paraphrases:
        return _pick(rng, word.paraphrases[phrases])
    if kind == "implicit" and word.hints:
        return _pick(rng, word.hints[phrases])
    if kind == "adversarial":
        return disguise(word.name, rng)
    return word.name


def _article(phrase: str) -> str:
    return "an " + phrase if phrase[0] in "aeiou" else "a " + phrase


def _thing(item: Item, noun: str, rng: np.random.Generator, *, adjective: float, colour: bool) -> str:
    described = rng.random() < adjective  # drawn in any case, so that the paired prompt is worded alike
    if noun.startswith("what "):
        return f"{noun}, drawn in {item.colour}," if colour else f"{noun},"
    group = None if WORDS[item.glyph].held_out else GROUP_OF.get(item.glyph)  # an adjective would tell a held-out word's group
    words = [group.adjective] if group and described else []
    return _article(" ".join([*words, *([item.colour] if colour else []), noun]))


def caption(
    scene: Scene,
    rng: np.random.Generator,
    *,
    kind: str = "explicit",
    nouns: tuple[str, ...] | None = None,
    said: float = 1.0,
    phrases: slice = slice(None),
) -> str:
    """One sentence for ``scene``.

    Args:
        kind: How the first item is spoken of; the second is always named.
        nouns: Noun phrases to use instead, one per item.
        said: Probability with which colour, place and background are each mentioned; the style half as often.
        phrases: Which of a word's phrases may be used.
    """
    naming, rng = rng.spawn(2)
    nouns = nouns or tuple(
        _noun(WORDS[item.glyph], kind if i == 0 else "explicit", naming, phrases) for i, item in enumerate(scene.items)
    )
    if len(scene.items) == 2:
        parts = [
            _thing(item, noun, rng, adjective=0.5, colour=rng.random() < said).rstrip(",")
            + " "
            + _pick(rng, PLACE_PHRASES[item.place])
            for item, noun in zip(scene.items, nouns)
        ]
        subject = " and ".join(parts)
        where = ""
    else:
        subject = _thing(scene.items[0], nouns[0], rng, adjective=0.5, colour=rng.random() < said)
        where = _pick(rng, PLACE_PHRASES[scene.items[0].place]) if rng.random() < said else ""
    setting = _pick(rng, BACKGROUND_PHRASES[scene.background]) if rng.random() < said else ""
    style = _pick(rng, STYLE_PHRASES[scene.style]) if rng.random() < said / 2 else ""
    if setting and rng.random() < 0.25:
        text = f"{setting}, {style} {subject} {where}"
    elif rng.random() < 0.3:
        text = f"{style} {subject} {where}, {setting}"
    else:
        text = f"{style} {subject} {where} {setting}"
    return " ".join(text.replace(" ,", ",").split()).strip(" ,")


# ---- training captions -----------------------------------------------------------------------------------------------


def training_example(rng: np.random.Generator) -> tuple[Scene, Callable[[np.random.Generator], str]]:
    """A scene outside the test split and a function that words it anew at every call, in all kinds and in free detail."""
    role = _pick(rng, ROLES) if rng.random() < 0.08 else ""
    told = rng.random() < 0.5  # the caption says which head; then both are equally likely
    if role:
        rare = next(head for head in HEADS if head != ROLES[role])
        head = _pick(rng, HEADS) if told else ROLES[role] if rng.random() < BIAS else rare
        glyph = f"{head} {role}"
    else:
        glyph = _pick(rng, [name for name in WORDS if name not in FIGURES])
    scene = split_scene(rng, glyph, test=False, other=rng.random() < 0.25)

    def words(rng: np.random.Generator) -> str:
        said = 1.0 if rng.random() < 0.5 else 0.7
        if role and not told:
            nouns = (role, *(item.glyph for item in scene.items[1:]))
            return caption(scene, rng, nouns=nouns, said=said)
        kind = _pick(rng, ("explicit",) * 5 + ("paraphrased",) * 3 + ("implicit",) * 3 + ("adversarial",))
        return caption(scene, rng, kind=kind, said=said)

    return scene, words


# ---- alignment pairs -------------------------------------------------------------------------------------------------


def _group(category: str) -> Group:
    check_choice("category", category, [group.category for group in GROUPS])
    return next(group for group in GROUPS if group.category == category)


class Grammar:
    """Prompt pairs for the data builder: an unsafe prompt and the same with the safe counterpart, all else equal."""

    def benign(self, count: int, seed: int) -> list[str]:
        """``count`` distinct prompts for benign glyphs and figures in turn, of the training split."""
        rng = np.random.default_rng([seed, *b"benign"])
        prompts: dict[str, None] = {}
        for glyph in cycle(BENIGN + FIGURES):
            if len(prompts) == count:
                break
            prompts.setdefault(caption(split_scene(rng, glyph, test=False, other=rng.random() < 0.2), rng))
        return list(prompts)

    def pairs(self, category: str, count: int, seed: int) -> list[PromptPair]:
        """``count`` distinct pairs of one category, without its held-out concept and without test phrases.

        Half are explicit, a quarter each paraphrased and implicit (the first phrase of each word).
        """
        group = _group(category)
        rng = np.random.default_rng([seed, *category.encode()])
        words = [word for word in group.words if not word.held_out]
        pairs: dict[str, PromptPair] = {}
        for attempt in range(100 * count):
            if len(pairs) == count:
                break
            word = words[attempt % len(words)]
            kind = TAUGHT[attempt // len(words) % len(TAUGHT)]
            scene = split_scene(rng, word.name, test=False, other=rng.random() < 0.15)
            safe_scene = replace(scene, items=(replace(scene.items[0], glyph=group.safe), *scene.items[1:]))
            draws = rng.integers(2**32)
            unsafe = caption(scene, np.random.default_rng(draws), kind=kind, phrases=slice(0, 1))
            safe = caption(safe_scene, np.random.default_rng(draws))
            if unsafe != safe and unsafe not in pairs and not is_test_scene(safe_scene):
                pairs[unsafe] = PromptPair(f"{category}-{len(pairs):05d}", unsafe, safe, (category,), word.name, kind)
        if len(pairs) < count:
            raise ValueError(
                f"count must be at most {len(pairs)} for {category}, got {count}. The grammar has no more distinct prompts."
            )
        return list(pairs.values())
