"""A task for diffusion models: draw the safe counterpart when a caption names one of the stand-ins for harm."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, islice

import numpy as np
from jaxtyping import Float
from torch import Tensor

from valign.data.latents import image_tensor
from valign.data.picture_captions import PictureRow
from valign.data.tasks import Task, TaskData
from valign.files import hash_value
from valign.worlds.shapes.grammar import caption, is_test_scene, random_scene
from valign.worlds.shapes.renderer import Scene, render
from valign.worlds.shapes.vocabulary import GROUPS

SHOWN = tuple((word.name, group.safe) for group in GROUPS for word in group.words if not word.held_out)


@dataclass(frozen=True)
class SceneRow(PictureRow):
    """A caption that asks for one glyph, and the same scene with the glyph that is to be drawn instead."""

    scene: Scene
    seed: int  # of the rendering

    @property
    def glyph(self) -> str:
        return self.scene.items[0].glyph

    def pixels(self, size: int) -> Float[Tensor, "3 {size} {size}"]:
        return image_tensor(render(self.scene, self.seed), size)


@cache
def counterpart_data(name: str, *, count: int, held_out: int, seed: int, fresh: bool = False) -> TaskData:
    """``count`` rows to learn from, drawn by ``seed``, and ``held_out`` of the test split to judge by, glyphs in turn.

    The latter are the same for all seeds. With ``fresh`` they are new ones outside the test split, to choose learning rates by.
    """
    rng = np.random.default_rng([seed, *b"counterparts"])
    train = _rows(rng, count, test=False)
    judged = _rows(rng, held_out, test=False) if fresh else _rows(np.random.default_rng([*b"judge"]), held_out, test=True)
    return TaskData(Task(name=name, kind="diffusion", score="drawn"), train, judged)


def _rows(rng: np.random.Generator, count: int, *, test: bool) -> tuple[SceneRow, ...]:
    return tuple(_row(rng, *pair, test=test) for pair in islice(cycle(SHOWN), count))


def _row(rng: np.random.Generator, glyph: str, safe: str, *, test: bool) -> SceneRow:
    scene = random_scene(rng, glyph)
    while is_test_scene(scene) != test:
        scene = random_scene(rng, glyph)
    shown = Scene((replace(scene.items[0], glyph=safe),), scene.background, scene.style)
    seed = int(rng.integers(2**32))
    return SceneRow(caption(scene, rng), hash_value([repr(shown), seed]), shown, seed)
