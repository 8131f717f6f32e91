"""DARE: drop random entries of each expert's change and rescale the rest (arXiv 2311.03099), then elect signs as TIES does."""

import hashlib
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import option
from valign.merging.base import MergeContext
from valign.merging.deltas import Delta, DenseDelta
from valign.merging.experts import Expert
from valign.merging.ties import Normalize, Ties
from valign.methods import Method

METHOD = Method(
    slug="dare-ties",
    title="DARE with sign election",
    paper="arXiv 2311.03099",
    room="merging",
    entry="valign.merging.dare_ties:merge_dare_ties",
    fidelity="exact",
    note="drop and rescale by one over the density as published (mergekit rescales to the sum of magnitudes), then TIES's election",
)


@dataclass(frozen=True, kw_only=True)
class DareTies(Ties):
    """Drop random entries, rescale, elect signs, add what agrees (DARE, arXiv 2311.03099)."""

    density: float = option(0.5, help="fraction of entries that is kept, in (0, 1]; one minus the drop rate", above=0, high=1)
    seed: int = option(0, help="of every random draw")

    recorded: ClassVar[tuple[str, ...]] = ("seed",)
    example: ClassVar[str] = "runs/hate runs/violence --density 0.5 -o runs/dare"

    def sparsify(self, delta: Delta, module: str, expert: str) -> Delta:
        """A random part of the entries, rescaled."""
        return DenseDelta(drop(delta.delta(), self.density, generator(self.seed, module, expert)))


def merge_dare_ties(
    experts: Sequence[Expert],
    *,
    density: float = 0.5,
    seed: int = 0,
    normalize: Normalize = "weights",
    scale: float = 1.0,
    rank: int | None = None,
    errors: MutableMapping[str, float] | None = None,
    allow_base_mismatch: bool = False,
) -> Iterator[tuple[str, Delta]]:
    """Drop, rescale, elect and add, entry by entry on dense deltas, one module at a time; the result is truncated to ``rank``.

    Args:
        density: Fraction of the entries that is KEPT, in (0, 1]; the paper's drop rate is ``1 - density``.
        seed: Each expert's mask in each module depends on this, the module's and the expert's name alone, so neither the order of
            modules nor that of experts matters.
        normalize, scale, rank, errors: As in `merge_ties`.
    """
    context = MergeContext(errors={} if errors is None else errors, allow_base_mismatch=allow_base_mismatch)
    return DareTies(density=density, seed=seed, normalize=normalize, scale=scale, rank=rank)(experts, context)


def drop(delta: Float[Tensor, "fan_out fan_in"], density: float, random: torch.Generator) -> Float[Tensor, "fan_out fan_in"]:
    """Keep each entry with probability ``density`` and divide it by that, so that the expected delta is unchanged."""
    return delta * (torch.rand(delta.shape, generator=random) < density) / density


def generator(seed: int, module: str, expert: str) -> torch.Generator:
    """A generator of its own for every module of every expert."""
    digest = hashlib.sha256(f"{seed}\n{module}\n{expert}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
