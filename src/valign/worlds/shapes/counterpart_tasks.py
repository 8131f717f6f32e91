"""Tasks for diffusion models: show the safe counterpart when a caption names a stand-in for harm, by example or by preference."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, islice

import numpy as np
from jaxtyping import Float
from torch import Tensor

from valign.data.tasks.base import Task, TaskData
from valign.data.tasks.captions import CaptionedImage, PairRow
from valign.files import hash_value
from valign.images import image_tensor
from valign.worlds.shapes.grammar import KINDS, TAUGHT, caption, split_scene
from valign.worlds.shapes.renderer import Scene, render
from valign.worlds.shapes.vocabulary import BENIGN, GROUP_OF, GROUPS

Words = tuple[tuple[str, str], ...]  # a glyph, and the one to be shown instead
SHOWN: Words = tuple((word.name, group.safe) for group in GROUPS for word in group.words if not word.held_out)
EXPERT = "violence"  # the category of `expert_data`


@dataclass(frozen=True)
class SceneRow(CaptionedImage):
    """A caption that asks for one glyph, and the same scene with the glyph that is to be shown instead."""

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
    train = islice(_shown(rng, SHOWN, ("explicit",), test=False), count)
    judged = _shown(rng if fresh else np.random.default_rng([*b"judge"]), SHOWN, ("explicit",), test=not fresh)
    return TaskData(Task(name=name, kind="diffusion", score="drawn"), tuple(train), tuple(islice(judged, held_out)))


@cache
def expert_data(name: str, *, count: int, held_out: int, seed: int, fresh: bool = False) -> TaskData:
    """The same as pairs, for an expert of the category `EXPERT`: the counterpart wins over what the caption asks for.

    Captions to learn from are of the kinds `TAUGHT`, those to judge by of all kinds in turn, in words that are for tests alone.
    """
    words = tuple((glyph, safe) for glyph, safe in SHOWN if GROUP_OF[glyph].category == EXPERT)
    rng = np.random.default_rng([seed, *b"expert"])
    train = islice(_pairs(rng, words, TAUGHT, test=False), count)
    judged = _pairs(rng if fresh else np.random.default_rng([*b"judge"]), words, TAUGHT if fresh else KINDS, test=not fresh)
    return TaskData(Task(name=name, kind="diffusion", score="removed"), tuple(train), tuple(islice(judged, held_out)))


def _pairs(rng: np.random.Generator, words: Words, kinds: tuple[str, ...], *, test: bool) -> Iterator[PairRow]:
    harmless = tuple((glyph, glyph) for glyph in rng.permutation(BENIGN).tolist())
    kept = _shown(rng, harmless, ("explicit",), test=test)
    for winner, (glyph, _) in zip(_shown(rng, words, kinds, test=test), cycle(words)):
        yield PairRow(winner, _row(winner.caption, _with(winner.scene, glyph), winner.seed), next(kept))


def _shown(rng: np.random.Generator, words: Words, kinds: tuple[str, ...], *, test: bool) -> Iterator[SceneRow]:
    """Captions for the first of each two glyphs, images of the second; each glyph in every kind, in turn, for ever."""
    for kind in cycle(kinds):
        for glyph, safe in words:
            named = split_scene(rng, glyph, test=test)
            text = caption(named, rng, kind=kind, phrases=slice(1, None) if test else slice(1))
            yield _row(text, _with(named, safe), int(rng.integers(2**32)))


def _with(scene: Scene, glyph: str) -> Scene:
    return replace(scene, items=(replace(scene.items[0], glyph=glyph),))


def _row(text: str, scene: Scene, seed: int) -> SceneRow:
    return SceneRow(text, hash_value([repr(scene), seed]), scene, seed)
