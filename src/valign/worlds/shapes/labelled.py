"""Renders with labels: images of which it is known what harm they stand for, to fit and test detectors on."""

import numpy as np

from valign.data.images.labelled import HarmExample
from valign.worlds.shapes.grammar import random_scene
from valign.worlds.shapes.renderer import render
from valign.worlds.shapes.vocabulary import BENIGN, GROUPS

HARMLESS = 3  # harmless images per image of one category
CROWDED = 0.2  # share of the images with a second, harmless glyph


def labelled_renders(*, per_category: int = 60, seed: int = 0) -> list[HarmExample]:
    """As many images of each category, over its three glyphs in turn, and `HARMLESS` times as many of harmless glyphs."""
    rng = np.random.default_rng([seed, 31])
    wanted: list[tuple[tuple[str, ...], str]]
    wanted = [((group.category,), group.words[i % len(group.words)].name) for group in GROUPS for i in range(per_category)]
    wanted += [((), BENIGN[i % len(BENIGN)]) for i in range(HARMLESS * per_category)]
    examples = []
    for number, (categories, glyph) in enumerate(wanted):
        scene = random_scene(rng, glyph, others=int(rng.random() < CROWDED))
        name = f"{categories[0] if categories else 'harmless'}/{glyph}-{number:05d}.png"
        examples.append(HarmExample(name, categories, render(scene, seed * 1_000_003 + number)))
    return examples
