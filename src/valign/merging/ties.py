"""TIES: keep each expert's largest changes, let the experts vote on every sign, add those that agree (arXiv 2306.01708)."""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import check_choice, check_range
from valign.merging.compress import compress_dense
from valign.merging.experts import Expert, compatible
from valign.methods import Method
from valign.models.files.adapter_files import LoraFactors

METHOD = Method(slug="ties", title="TIES merging", paper="arXiv 2306.01708", room="merging", entry="valign.merging.ties:merge_ties")

Normalize = Literal["weights", "count", "none"]
Parts = Callable[[], Iterator[tuple[float, Tensor]]]  # (weight, sparse delta) of every expert, made anew at each call


def merge_ties(
    experts: Sequence[Expert],
    *,
    density: float = 0.2,
    normalize: Normalize = "weights",
    scale: float = 1.0,
    rank: int | None = None,
    errors: MutableMapping[str, float] | None = None,
    allow_base_mismatch: bool = False,
) -> Iterator[tuple[str, LoraFactors]]:
    """Trim, elect signs and add, entry by entry on dense deltas, one module at a time; the result is truncated to ``rank``.

    Args:
        density: Fraction of each delta's entries that is KEPT, in (0, 1]; 0.2 is the paper's. Trimmed per module.
        normalize: What the sum of agreeing entries is divided by: the sum of their |weights| (then only the ratios of the weights
            matter), their count (the paper), or nothing.
        scale: The paper's lambda, times the result.
        rank: Of the result in every module; the sum of the experts' ranks if not given, clipped to the matrix.
        errors: Filled, module by module, with the relative Frobenius error of the truncation.
    """
    check_range("merge_ties.density", density, above=0, high=1)
    check_choice("merge_ties.normalize", normalize, ("weights", "count", "none"))
    check_range("merge_ties.scale", scale)
    check_range("merge_ties.rank", rank or 1, low=1)
    modules = compatible("merge_ties", experts, allow_base_mismatch=allow_base_mismatch)

    def deltas(module: str) -> Parts:
        return lambda: ((expert.weight, trim(expert.file.factors(module).delta(), density)) for expert in experts)

    return stream_elected(experts, modules, deltas, normalize=normalize, scale=scale, rank=rank, errors=errors)


def trim(delta: Float[Tensor, "fan_out fan_in"], density: float) -> Float[Tensor, "fan_out fan_in"]:
    """Zero all but the largest ``density`` of the entries by magnitude; entries as large as the smallest kept one stay too."""
    magnitude = delta.abs().flatten()
    keep = max(1, round(density * magnitude.numel()))
    threshold = magnitude.kthvalue(magnitude.numel() - keep + 1).values
    return delta * (delta.abs() >= threshold)


def elect(parts: Parts, normalize: Normalize) -> Float[Tensor, "fan_out fan_in"]:
    """Sum of ``weight * delta`` over the experts whose sign is that of the whole sum; an even vote (sum 0) elects nobody.

    Two passes over ``parts`` keep a handful of dense matrices in memory, however many experts there are.
    """
    total = sum((weight * delta for weight, delta in parts()), start=torch.zeros(()))
    sign = total.sign()
    result, divisor = torch.zeros_like(total), torch.zeros_like(total)
    for weight, delta in parts():
        agrees = ((weight * delta).sign() == sign) & (sign != 0)
        result += weight * delta * agrees
        divisor += (abs(weight) if normalize == "weights" else 1.0) * agrees
    return result if normalize == "none" else result / divisor.where(divisor > 0, 1.0)


def stream_elected(
    experts: Sequence[Expert],
    modules: Sequence[str],
    deltas: Callable[[str], Parts],
    *,
    normalize: Normalize,
    scale: float,
    rank: int | None,
    errors: MutableMapping[str, float] | None,
) -> Iterator[tuple[str, LoraFactors]]:
    """`elect` each module and write the result as factors."""
    for module in modules:
        wanted = rank or sum(expert.file.entries[module].rank for expert in experts)
        lora, error = compress_dense(scale * elect(deltas(module), normalize), wanted)
        if errors is not None:
            errors[module] = error
        yield module, lora
