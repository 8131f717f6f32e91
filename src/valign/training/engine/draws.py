"""Randomness by name, not by order: what a pair draws depends on the seed, the pair and the visit, never on the batch it is in.

So a training gives the same draws on one process or eight, and resumes without any generator's state.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from valign.randomness import generator_for


@dataclass(frozen=True)
class PairDraw:
    """All that is random about one visit to one pair. One timestep, one noise, one flip and one caption for both images."""

    timestep: int
    drop_caption: bool
    flip: bool
    noise: Float[Tensor, "channel height width"]
    winner_noise: Float[Tensor, "channel height width"]  # of the autoencoder's posterior
    loser_noise: Float[Tensor, "channel height width"]


def draw_pair(
    generator: torch.Generator,
    shape: tuple[int, int, int],
    *,
    num_timesteps: int,
    empty_prompt_prob: float = 0.0,
    flip_prob: float = 0.0,
    stratum: tuple[int, int] = (0, 1),
) -> PairDraw:
    """Draw one visit. ``timestep`` is uniform in [0, num_timesteps); with stratum ``(k, n)``, in its k-th of n equal parts."""
    part, parts = stratum
    when, drop, flip = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    noise = torch.randn(3, *shape, generator=generator)
    timestep = min(int((part + when) / parts * num_timesteps), num_timesteps - 1)
    return PairDraw(timestep, drop < empty_prompt_prob, flip < flip_prob, *noise)


@dataclass(frozen=True)
class Visits:
    """Which pairs a step takes: the pairs in a new order each epoch, cut into steps of equal size."""

    pairs: int
    per_step: int
    seed: int

    def at(self, step: int) -> list[tuple[int, int]]:
        """``(pair, visit)`` of every place in step ``step`` (from 0); ``visit`` counts the earlier epochs, so none occurs twice."""
        first = step * self.per_step
        places = [divmod(place, self.pairs) for place in range(first, first + self.per_step)]
        orders = {epoch: self._order(epoch) for epoch in {epoch for epoch, _ in places}}
        return [(int(orders[epoch][index]), epoch) for epoch, index in places]

    def _order(self, epoch: int) -> Int[Tensor, " pair"]:
        return torch.randperm(self.pairs, generator=generator_for("order", self.seed, epoch))


def share(items: list[tuple[int, int]], *, micro: int, micros: int, process: int, processes: int) -> list[tuple[int, int]]:
    """One process' part of one micro-batch. Together the parts of all are ``items``, each once; sizes are equal."""
    size = len(items) // (micros * processes)
    first = (micro * processes + process) * size
    return items[first : first + size]


@contextmanager
def drawing(*key: str | int) -> Iterator[None]:
    """Dropout, and the noise of diffusion, depend on torch's global seed: set it by name inside the block, and restore it."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(generator_for(*key).initial_seed())
        yield
