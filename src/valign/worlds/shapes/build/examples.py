"""Endless training examples of the shapes world, each a function of (seed, index)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from valign.worlds.shapes.grammar import training_example
from valign.worlds.shapes.renderer import Scene, render_array

Words = Callable[[np.random.Generator], str]


def example(seed: int, index: int) -> tuple[Scene, Words, np.ndarray]:
    """Scene, caption function and pixels in [0, 255] of example ``index``."""
    rng = np.random.default_rng([seed, index])
    scene, words = training_example(rng)
    return scene, words, render_array(scene, rng)


def wording(seed: int, index: int) -> Words:
    """The caption function of example ``index``, without rendering it."""
    return training_example(np.random.default_rng([seed, index]))[1]


def examples(seed: int, indices: Sequence[int]) -> tuple[list[Scene], list[Words], Float[Tensor, "batch 3 64 64"]]:
    """A batch; pixels in [-1, 1]."""
    scenes, words, arrays = zip(*(example(seed, index) for index in indices))
    return list(scenes), list(words), to_tensor(arrays)


def to_tensor(arrays: Sequence[np.ndarray]) -> Float[Tensor, "batch 3 64 64"]:
    """Pixel arrays in [0, 255] to a batch in [-1, 1]."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous() / 127.5 - 1
