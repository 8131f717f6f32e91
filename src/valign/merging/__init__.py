"""Combine experts into one adapter: exact on the changes of weight, streamed module by module."""

from collections.abc import Mapping

from valign.merging.base import Calibration, MergeContext, MergeMethod
from valign.merging.best_single import BestSingle, best_single
from valign.merging.calibration import collect_votes
from valign.merging.co_merge import CoMerge, co_merge
from valign.merging.compress import compress
from valign.merging.dare_ties import DareTies, merge_dare_ties
from valign.merging.delta_merge import DeltaMerge
from valign.merging.deltas import Delta, DenseDelta, NamedDeltas
from valign.merging.experts import Expert, compatible
from valign.merging.mean import MeanMerge, merge_mean
from valign.merging.plan import MergePlan, plan_merge
from valign.merging.regmean import RegMean, regmean
from valign.merging.selection import SelectionReport, save_selection, selection_report
from valign.merging.sum import SumMerge, merge_sum
from valign.merging.ties import Ties, merge_ties
from valign.merging.votes import Ballot, Votes
from valign.merging.writing import kernels_of, merge_metadata, write_merge
from valign.plugins import with_plugins

# name -> the merge as a dataclass of options; entry points of the group ``valign.merges`` add rows
MERGES: Mapping[str, type[MergeMethod]] = with_plugins(
    "valign.merges",
    {
        "regmean": RegMean,
        "co-merge": CoMerge,
        "mean": MeanMerge,
        "sum": SumMerge,
        "ties": Ties,
        "dare-ties": DareTies,
        "best-single": BestSingle,
    },
)

__all__ = [
    "MERGES",
    "Ballot",
    "BestSingle",
    "Calibration",
    "CoMerge",
    "DareTies",
    "Delta",
    "DeltaMerge",
    "DenseDelta",
    "Expert",
    "MeanMerge",
    "MergeContext",
    "MergeMethod",
    "MergePlan",
    "NamedDeltas",
    "RegMean",
    "SelectionReport",
    "SumMerge",
    "Ties",
    "Votes",
    "best_single",
    "co_merge",
    "collect_votes",
    "compatible",
    "compress",
    "kernels_of",
    "merge_dare_ties",
    "merge_mean",
    "merge_metadata",
    "merge_sum",
    "merge_ties",
    "plan_merge",
    "regmean",
    "save_selection",
    "selection_report",
    "write_merge",
]
