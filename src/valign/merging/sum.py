"""The weighted sum of the experts' changes (task arithmetic, arXiv 2212.04089), exact: the factors are stacked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from valign.merging.base import MergeContext
from valign.merging.delta_merge import DeltaMerge
from valign.merging.deltas import Delta
from valign.merging.experts import Expert
from valign.methods import Method

METHOD = Method(
    slug="sum",
    title="Exact sum of experts",
    paper="arXiv 2212.04089",
    room="merging",
    entry="valign.merging.sum:merge_sum",
    fidelity="exact",
    note="the sum of the changes themselves, held against dense arithmetic",
)


@dataclass(frozen=True, kw_only=True)
class SumMerge(DeltaMerge):
    """Add the experts' changes, exactly, without mixing their factors."""

    grid: ClassVar[tuple[Mapping[str, float], ...]] = tuple({"weight": weight} for weight in (0.5, 0.7, 0.9, 1.2, 1.6))
    example: ClassVar[str] = "style=runs/style safety=runs/merged --weight style=0.8 -o runs/both"


def merge_sum(experts: Sequence[Expert], *, allow_base_mismatch: bool = False) -> Iterator[tuple[str, Delta]]:
    """``delta = sum_n weight_n delta_n``; the rank of the result is the sum of the ranks, module by module in sorted order.

    Adding factors instead of deltas (peft's ``linear``) is not a sum: it would add ``up_1 down_2 + up_2 down_1``.
    """
    return SumMerge()(experts, MergeContext(allow_base_mismatch=allow_base_mismatch))
