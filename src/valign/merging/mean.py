"""The mean of the experts' changes, exact: the baseline that every other merge has to beat."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from valign.merging.base import MergeContext
from valign.merging.delta_merge import DeltaMerge
from valign.merging.deltas import Delta
from valign.merging.experts import Expert
from valign.methods import Method

METHOD = Method(
    slug="mean",
    title="Exact mean of experts",
    paper="-",
    room="merging",
    entry="valign.merging.mean:merge_mean",
    fidelity="exact",
    note="the mean of the changes themselves, held against dense arithmetic; peft's linear merge adds products across experts",
)


@dataclass(frozen=True, kw_only=True)
class MeanMerge(DeltaMerge):
    """Average the experts' changes, exactly. Weights multiply; the divisor is the number of experts."""

    # times the number of experts these are the sum's: seven experts at 7 are added as they are
    grid: ClassVar[tuple[Mapping[str, float], ...]] = tuple({"weight": weight} for weight in (1.0, 2.0, 4.0, 6.0, 9.0))
    example: ClassVar[str] = "runs/hate runs/violence -o runs/mean"

    def rescale(self, merged: Delta, experts: int) -> Delta:
        """Divide by the number of experts."""
        return merged.folded(1 / experts)


def merge_mean(experts: Sequence[Expert], *, allow_base_mismatch: bool = False) -> Iterator[tuple[str, Delta]]:
    """``delta = (1 / N) sum_n weight_n delta_n``. ``N`` counts experts, it does not sum weights."""
    return MeanMerge()(experts, MergeContext(allow_base_mismatch=allow_base_mismatch))
