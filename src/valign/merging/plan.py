"""A dry run: do these experts fit together, how alike are they, and what would a lower rank cost?"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from valign.checks import check_range
from valign.merging.compress import discarded, spectrum
from valign.merging.deltas import add, inner
from valign.merging.experts import Expert, compatible
from valign.merging.moments import moment_bytes


@dataclass(frozen=True)
class MergePlan:
    """Figures on the weighted deltas, over all modules together."""

    modules: int
    experts: tuple[str, ...]
    ranks: tuple[tuple[int, int], ...]  # lowest and highest rank of each expert
    norms: tuple[float, ...]  # Frobenius norm of each expert's whole change
    cosines: tuple[tuple[float, ...], ...]  # between the experts' whole changes, in [-1, 1]; 0 for a zero expert
    rank: int  # the rank that `error` is about
    error: float  # relative Frobenius error of the sum, truncated to `rank` in every module
    worst_module: str
    worst_error: float
    moment_bytes: int  # second moments that `regmean` would hold


def plan_merge(experts: Sequence[Expert], *, rank: int | None = None, allow_base_mismatch: bool = False) -> MergePlan:
    """Compare experts on their exact deltas without forming one; ``rank`` defaults to the largest of theirs."""
    modules = compatible("plan_merge", experts, allow_base_mismatch=allow_base_mismatch)
    rank = rank or max(entry.rank for expert in experts for entry in expert.file.entries.values())
    check_range("plan_merge.rank", rank, low=1)
    n = len(experts)
    products = [[0.0] * n for _ in range(n)]
    lost = energy = 0.0
    errors = {}
    for module in modules:
        parts = [expert.factors(module) for expert in experts]
        for i in range(n):
            for j in range(i + 1):
                products[i][j] = products[j][i] = products[i][j] + inner(parts[i], parts[j])
        values = spectrum(add(parts))
        errors[module] = discarded(values, rank)
        lost += float(values[rank:].square().sum())
        energy += float(values.square().sum())
    norms = [sqrt(max(0.0, products[i][i])) for i in range(n)]
    cosines = tuple(
        tuple(products[i][j] / (norms[i] * norms[j]) if norms[i] * norms[j] > 0 else 0.0 for j in range(n)) for i in range(n)
    )
    ranks = tuple(
        (min(entry.rank for entry in expert.file.entries.values()), max(entry.rank for entry in expert.file.entries.values()))
        for expert in experts
    )
    worst = max(sorted(errors), key=lambda module: errors[module])
    error = sqrt(lost / energy) if energy > 0 else 0.0
    names = tuple(expert.name for expert in experts)
    widths = {module: experts[0].file.entries[module].shape[1] for module in modules}
    held = moment_bytes(widths, groups=n + 1)
    return MergePlan(len(modules), names, ranks, tuple(norms), cosines, rank, error, worst, errors[worst], held)
