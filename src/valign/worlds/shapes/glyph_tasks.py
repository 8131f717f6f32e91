"""Few-shot tasks of the shapes world: name the glyph in an image.

The bundled CLIP tells colours, places and backgrounds apart but hardly glyphs: there is something to learn and something to lose.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from valign.data.tasks.base import Task, TaskData
from valign.data.tasks.images import LabelledImage
from valign.worlds.shapes.grammar import caption, is_test_scene, random_scene, split_scene
from valign.worlds.shapes.renderer import Scene, render
from valign.worlds.shapes.vocabulary import BENIGN, GROUP_OF

TEMPLATE = "a {}"
LEARNT = BENIGN[:12]  # the glyphs of the tasks
KEPT = tuple(GROUP_OF)  # those of `captioned`, which no task shows


@dataclass(frozen=True)
class Captioned:
    """Images with the sentence that describes each, no two alike."""

    rows: tuple[LabelledImage, ...]
    captions: tuple[str, ...]


@cache
def glyph_data(name: str, *, shots: int, held_out: int, seed: int, fresh: bool = False) -> TaskData:
    """``shots`` training images of each of `LEARNT`, drawn by ``seed``, and ``held_out`` images of the test split to judge by.

    The latter are the same for all seeds, and fewer where `LEARNT` does not divide them. Every glyph is in the centre, in the flat
    style; colours and backgrounds are free. With ``fresh`` as many new images outside the test split judge instead, to choose
    learning rates by. Rows take turns by class.
    """
    rng = np.random.default_rng([seed, *b"shots"])
    train = _drawn(rng, shots, test=False)
    if fresh:
        judged = _drawn(rng, shots, test=False)
    else:
        judged = _drawn(np.random.default_rng([*b"judge"]), held_out // len(LEARNT), test=True)
    return TaskData(Task(name=name, kind="classification"), train, judged)


@cache
def captioned(count: int) -> Captioned:
    """``count`` images of the test split with full captions, of glyphs that no task shows, in turn: what CLIP could do before."""
    rng = np.random.default_rng([*b"kept"])
    found: dict[str, LabelledImage] = {}
    while len(found) < count:
        glyph = KEPT[len(found) % len(KEPT)]
        scene = split_scene(rng, glyph, test=True)
        found.setdefault(caption(scene, rng), _row(scene, glyph, rng))
    return Captioned(tuple(found.values()), tuple(found))


def _drawn(rng: np.random.Generator, count: int, *, test: bool) -> tuple[LabelledImage, ...]:
    """``count`` images of each of `LEARNT`."""
    return tuple(_row(_centred(rng, glyph, test=test), glyph, rng) for _ in range(count) for glyph in LEARNT)


def _centred(rng: np.random.Generator, glyph: str, *, test: bool) -> Scene:
    while True:
        scene = random_scene(rng, glyph)
        scene = Scene((replace(scene.items[0], place="centre"),), scene.background, "flat")
        if is_test_scene(scene) == test:
            return scene


def _row(scene: Scene, glyph: str, rng: np.random.Generator) -> LabelledImage:
    return LabelledImage(np.asarray(render(scene, int(rng.integers(2**32)))), glyph)
