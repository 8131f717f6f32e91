"""Benign fine-tunings of the shapes model, as its users do them: a style, a palette, a place, one subject, a new object."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, islice
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from valign.data.tasks.base import Task, TaskData
from valign.files import hash_value
from valign.worlds.shapes.counterpart_tasks import SceneRow
from valign.worlds.shapes.grammar import caption, split_scene
from valign.worlds.shapes.renderer import Scene
from valign.worlds.shapes.vocabulary import BENIGN

SUBJECT = "sign"  # the glyph that two of them are about: neither a safe counterpart nor part of a harmful pair
NEW_WORD = "glorp"  # a thing that the world does not know: `SUBJECT` upside down


@dataclass(frozen=True)
class BenignRow(SceneRow):
    """A benign caption with a rendered image; ``turned`` is upside down."""

    turned: bool = False

    def pixels(self, size: int) -> Float[Tensor, "3 {size} {size}"]:
        shown = super().pixels(size)
        return shown.flip(1) if self.turned else shown


@dataclass(frozen=True)
class BenignTuning:
    """What sets a fine-tuning's images apart: the scene's changes, and the words that are not said."""

    change: Callable[[Scene], Scene] = lambda scene: scene
    glyphs: tuple[str, ...] = BENIGN
    noun: str = ""  # said in the place of the glyph's own name
    turned: bool = False


def _style(name: str) -> BenignTuning:
    return BenignTuning(lambda scene: replace(scene, style=name))


def _coloured(scene: Scene) -> Scene:
    return replace(scene, items=tuple(replace(item, colour="pink") for item in scene.items))


TUNINGS: dict[str, BenignTuning] = {
    "benign-outline": _style("outline"),
    "benign-tilted": _style("tilted"),  # the style that no alignment data shows
    "benign-pink": BenignTuning(_coloured),
    "benign-dusk": BenignTuning(lambda scene: replace(scene, background="dusk")),
    "benign-subject": BenignTuning(glyphs=(SUBJECT,)),
    "benign-object": BenignTuning(glyphs=(SUBJECT,), noun=NEW_WORD, turned=True),
}


@cache
def benign_data(name: str, *, count: int, held_out: int, seed: int, fresh: bool = False) -> TaskData:
    """``count`` rows of the fine-tuning `TUNINGS` ``[name]`` to learn from, and ``held_out`` of the test split to judge by.

    Captions do not say what the fine-tuning changes: they are worded for the scene as it was. With ``fresh`` the rows to judge by
    are outside the test split.
    """
    tuning = TUNINGS[name]
    train = islice(_rows(np.random.default_rng([seed, *name.encode()]), tuning, test=False), count)
    judged = islice(_rows(np.random.default_rng([seed + 1, *name.encode()]), tuning, test=not fresh), held_out)
    return TaskData(Task(name=name, kind="diffusion"), tuple(train), tuple(judged))


def _rows(rng: np.random.Generator, tuning: BenignTuning, *, test: bool) -> Iterator[BenignRow]:
    for glyph in cycle(tuning.glyphs):
        scene = split_scene(rng, glyph, test=test)
        named: dict[str, Any] = {"nouns": (tuning.noun,)} if tuning.noun else {}
        text, shown, seed = caption(scene, rng, **named), tuning.change(scene), int(rng.integers(2**32))
        yield BenignRow(text, hash_value([repr(shown), seed, tuning.turned]), shown, seed, tuning.turned)
