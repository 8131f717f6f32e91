"""TIES: keep each expert's largest changes, let the experts vote on every sign, add those that agree (arXiv 2306.01708)."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError, check_range, option
from valign.merging.base import MergeContext
from valign.merging.delta_merge import DeltaMerge, Parts
from valign.merging.deltas import Delta, DenseDelta
from valign.merging.experts import Expert
from valign.methods import Method

METHOD = Method(
    slug="ties",
    title="TIES merging",
    paper="arXiv 2306.01708",
    room="merging",
    entry="valign.merging.ties:merge_ties",
    fidelity="variant",
    note="entry by entry as peft's and mergekit's; trimmed per module, where the paper trims over the whole change, and divided "
    "by weights unless set to count",
)

Normalize = Literal["weights", "count", "none"]
Matrices = Callable[[], Iterator[tuple[float, Tensor]]]  # (weight, sparse delta) of every expert, made anew at each call


@dataclass(frozen=True, kw_only=True)
class Ties(DeltaMerge):
    """Keep each expert's largest changes, elect signs, add what agrees (TIES, arXiv 2306.01708)."""

    density: float = option(0.2, help="fraction of entries that is kept, in (0, 1]; 0.2 is the paper's", above=0, high=1)
    normalize: Normalize = option("weights", help="what the sum of agreeing entries is divided by; the paper's is count")
    scale: float = option(1.0, help="factor on the result, the paper's lambda")
    rank: int | None = option(None, help="rank of the result in every module; the error is reported", low=1)

    grid: ClassVar[tuple[Mapping[str, float], ...]] = tuple({"scale": scale} for scale in (0.7, 1.0, 1.5, 2.2, 3.0))
    example: ClassVar[str] = "runs/hate runs/violence --density 0.2 -o runs/ties"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(f"{type(self).__name__}.scale", self.scale)

    def __call__(self, experts: Sequence[Expert], context: MergeContext) -> Iterator[tuple[str, Delta]]:
        sizes = {abs(expert.weight) for expert in experts}
        if self.normalize == "weights" and len(sizes) == 1 and not sizes & {0.0, 1.0}:
            raise UserError(
                f"{type(self).__name__}: equal weights of {sizes.pop():g} have no effect: normalize 'weights' divides by them. "
                "Leave the weights out and set scale, or normalize by count."
            )
        return super().__call__(experts, context)

    def sparsify(self, delta: Delta, module: str, expert: str) -> Delta:
        """The largest entries of each module."""
        return DenseDelta(trim(delta.delta(), self.density))

    def consensus(self, parts: Parts) -> Delta:
        """The elected sum."""
        return DenseDelta(elect(lambda: ((weight, delta.delta()) for weight, delta in parts()), self.normalize))

    def rescale(self, merged: Delta, experts: int) -> Delta:
        """Times ``scale``."""
        return merged.folded(self.scale)


def merge_ties(
    experts: Sequence[Expert],
    *,
    density: float = 0.2,
    normalize: Normalize = "weights",
    scale: float = 1.0,
    rank: int | None = None,
    errors: MutableMapping[str, float] | None = None,
    allow_base_mismatch: bool = False,
) -> Iterator[tuple[str, Delta]]:
    """Trim, elect signs and add, entry by entry on dense deltas, one module at a time; the result is truncated to ``rank``.

    Args:
        density: Fraction of each delta's entries that is KEPT, in (0, 1]; 0.2 is the paper's. Trimmed per module.
        normalize: What the sum of agreeing entries is divided by: the sum of their |weights| (then only the ratios of the weights
            matter), their count (the paper), or nothing.
        scale: The paper's lambda, times the result.
        rank: Of the result in every module; the sum of the experts' ranks if not given, clipped to the matrix.
        errors: Filled, module by module, with the relative Frobenius error of the truncation.
    """
    context = MergeContext(errors={} if errors is None else errors, allow_base_mismatch=allow_base_mismatch)
    return Ties(density=density, normalize=normalize, scale=scale, rank=rank)(experts, context)


def trim(delta: Float[Tensor, "fan_out fan_in"], density: float) -> Float[Tensor, "fan_out fan_in"]:
    """Zero all but the largest ``density`` of the entries by magnitude; entries as large as the smallest kept one stay too."""
    magnitude = delta.abs().flatten()
    keep = max(1, round(density * magnitude.numel()))
    threshold = magnitude.kthvalue(magnitude.numel() - keep + 1).values
    return delta * (delta.abs() >= threshold)


def elect(parts: Matrices, normalize: Normalize) -> Float[Tensor, "fan_out fan_in"]:
    """Sum of ``weight * delta`` over the experts whose sign is that of the whole sum; an even vote (sum 0) gives 0.

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
