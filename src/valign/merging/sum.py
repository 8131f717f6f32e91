"""The weighted sum of the experts' changes (task arithmetic, arXiv 2212.04089), exact: the factors are stacked."""

from collections.abc import Iterator, Sequence

import torch

from valign.merging.experts import Expert, compatible
from valign.methods import Method
from valign.models.files.adapter_files import LoraFactors

METHOD = Method(
    slug="sum", title="Exact sum of experts", paper="arXiv 2212.04089", room="merging", entry="valign.merging.sum:merge_sum"
)


def merge_sum(experts: Sequence[Expert], *, allow_base_mismatch: bool = False) -> Iterator[tuple[str, LoraFactors]]:
    """``delta = sum_n weight_n delta_n``; the rank of the result is the sum of the ranks, module by module in sorted order.

    Adding factors instead of deltas (peft's ``linear``) is no sum: it would add ``up_1 down_2 + up_2 down_1``.
    """
    modules = compatible("merge_sum", experts, allow_base_mismatch=allow_base_mismatch)
    return ((module, stack([expert.factors(module) for expert in experts])) for module in modules)


def stack(parts: Sequence[LoraFactors], multiplier: float = 1.0) -> LoraFactors:
    """``multiplier * sum of the parts``, as one pair of factors whose rank is the sum of theirs."""
    parts = [part.folded(multiplier) for part in parts]
    return LoraFactors(torch.cat([part.down for part in parts]), torch.cat([part.up for part in parts], dim=1), 1.0)
