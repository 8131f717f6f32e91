"""Few-shot tasks of the shapes world: name the glyph in a picture.

The bundled CLIP tells colours, places and backgrounds apart but hardly glyphs: there is something to learn, and something to forget.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from valign.data.image_tasks import ImageRow
from valign.data.tasks import Task, TaskData
from valign.worlds.shapes.grammar import caption, held_out_scene, training_scene
from valign.worlds.shapes.renderer import Scene, render
from valign.worlds.shapes.vocabulary import BENIGN, GROUP_OF

TEMPLATE = "a {}"
LEARNT = BENIGN[:12]  # the glyphs of the tasks
KEPT = tuple(GROUP_OF)  # those of `captioned`, which no task shows


@dataclass(frozen=True)
class Captioned:
    """Pictures with the sentence that describes each, no two alike."""

    rows: tuple[ImageRow, ...]
    captions: tuple[str, ...]


@cache
def glyph_data(name: str, *, shots: int, held_out: int, seed: int, fresh: bool = False) -> TaskData:
    """``shots`` training pictures of each of `LEARNT`, drawn by ``seed``, and ``held_out`` pictures of the test split to judge by.

    The latter are the same for all seeds, and fewer where `LEARNT` does not divide them. Colours, places, backgrounds and styles are
    free on both sides. With ``fresh`` as many new pictures outside the test split judge instead, to choose learning rates by. Rows
    take turns by class.
    """
    rng = np.random.default_rng([seed, *b"shots"])
    train = [_row(training_scene(rng, glyph), glyph, rng) for _ in range(shots) for glyph in LEARNT]
    if fresh:
        judged = [_row(training_scene(rng, glyph), glyph, rng) for _ in range(shots) for glyph in LEARNT]
    else:
        rng = np.random.default_rng([*b"judge"])
        judged = [_row(held_out_scene(rng, glyph), glyph, rng) for _ in range(max(1, held_out // len(LEARNT))) for glyph in LEARNT]
    return TaskData(Task(name=name, kind="classification"), tuple(train), tuple(judged))


@cache
def captioned(count: int) -> Captioned:
    """``count`` pictures of the test split with full captions, of glyphs that no task shows, in turn: what CLIP could do before."""
    rng = np.random.default_rng([*b"kept"])
    found: dict[str, ImageRow] = {}
    while len(found) < count:
        glyph = KEPT[len(found) % len(KEPT)]
        scene = held_out_scene(rng, glyph)
        found.setdefault(caption(scene, rng), _row(scene, glyph, rng))
    return Captioned(tuple(found.values()), tuple(found))


def _row(scene: Scene, glyph: str, rng: np.random.Generator) -> ImageRow:
    return ImageRow(np.asarray(render(scene, int(rng.integers(2**32)))), glyph)
