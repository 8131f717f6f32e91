"""The mean of the experts' changes, exact: the baseline that every other merge has to beat."""

from collections.abc import Iterator, Sequence

from valign.merging.experts import Expert, compatible
from valign.merging.sum import stack
from valign.methods import Method
from valign.models.files.adapter_files import LoraFactors

METHOD = Method(slug="mean", title="Exact mean of experts", paper="-", room="merging", entry="valign.merging.mean:merge_mean")


def merge_mean(experts: Sequence[Expert], *, allow_base_mismatch: bool = False) -> Iterator[tuple[str, LoraFactors]]:
    """``delta = (1 / N) sum_n weight_n delta_n``. ``N`` counts experts, it does not sum weights."""
    modules = compatible("merge_mean", experts, allow_base_mismatch=allow_base_mismatch)
    return ((module, stack([expert.factors(module) for expert in experts], 1 / len(experts))) for module in modules)
