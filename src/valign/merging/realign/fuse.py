"""How several fine-tuned models become one change before, or while, they are realigned."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from valign.checks import option
from valign.merging.dare_ties import drop, generator
from valign.merging.delta_merge import DeltaMerge
from valign.merging.deltas import Delta, DenseDelta
from valign.merging.mean import MeanMerge
from valign.merging.sum import SumMerge
from valign.merging.ties import Ties

Fuse = Literal["none", "mean", "task-arithmetic", "ties", "dare"]


@dataclass(frozen=True, kw_only=True)
class DareSum(DeltaMerge):
    """Drop random entries of each change, rescale the rest, and add (DARE, arXiv 2311.03099, without an election of signs)."""

    density: float = option(0.8, help="fraction of entries that is kept, in (0, 1]", above=0, high=1)
    seed: int = option(0, help="of every random draw")

    def sparsify(self, delta: Delta, module: str, expert: str) -> Delta:
        """A random part of the entries, rescaled."""
        return DenseDelta(drop(delta.delta(), self.density, generator(self.seed, module, expert)))


# name -> the merge, and the factor of SOMF's code on its result
FUSES: Mapping[str, tuple[DeltaMerge, float]] = {
    "mean": (MeanMerge(), 1.0),
    "task-arithmetic": (SumMerge(), 0.3),
    "ties": (Ties(density=0.2, normalize="none"), 0.4),
    "dare": (DareSum(), 0.3),
}


def fused(how: Fuse, scale: float | None, weight: str, models: Sequence[str], tasks: Sequence[Delta]) -> Delta:
    """One change of several; of one model it is as it is.

    Args:
        scale: Factor on the result; None is the one of SOMF's code.
        weight: The weight's name, on which DARE's draws depend.
        models: Names of the fine-tuned models, one per task vector.
    """
    if len(tasks) == 1:
        return tasks[0]
    merge, usual = FUSES[how]

    def parts() -> Iterator[tuple[str, float, Delta]]:
        return zip(models, [1.0] * len(models), tasks)

    return merge.combine(weight, parts, len(tasks)).folded(usual if scale is None else scale)
