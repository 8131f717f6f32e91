"""Lower the rank of a change of weight with the least error possible (Eckart-Young), and return that error."""

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import check_range
from valign.merging.deltas import Delta, DenseDelta
from valign.models.files.adapter_files import LoraFactors


def spectrum(delta: Delta) -> Float[Tensor, " rank"]:
    """Singular values of a change of weight, descending, float64; of factors at most ``rank``, from their small core alone."""
    return torch.linalg.svdvals(delta.matrix.double()) if isinstance(delta, DenseDelta) else decompose(delta)[1]


def compress(lora: LoraFactors, rank: int) -> tuple[LoraFactors, float]:
    """The best approximation of rank ``rank``, and its relative error ``|delta - result| / |delta|`` (Frobenius; 0 for zero).

    QR of both factors and an SVD of the small core, in float64: cost ``O((fan_out + fan_in) r^2)``, no dense matrix. The singular
    values are split evenly (``U sqrt(S)``, ``sqrt(S) V^T``), with signs that do not depend on the linear-algebra library.
    Raises: ValueError if ``rank`` is not in [1, the adapter's rank].
    """
    check_range("compress.rank", rank, low=1, high=lora.rank, hint="More than the factors hold would change nothing.")
    left, values, right = decompose(lora)
    return _balanced(left, values, right, rank), discarded(values, rank)


def compress_dense(delta: Float[Tensor, "fan_out fan_in"], rank: int) -> tuple[LoraFactors, float]:
    """`compress` for a dense change of weight; a ``rank`` beyond the matrix's own is clipped to it."""
    check_range("compress_dense.rank", rank, low=1)
    left, values, right = torch.linalg.svd(delta.float(), full_matrices=False)
    return _balanced(left, values, right, min(rank, len(values))), discarded(values.double(), rank)


def discarded(values: Float[Tensor, " rank"], rank: int) -> float:
    """Relative Frobenius error of keeping the ``rank`` largest ``values``: ``sqrt(energy left out / energy)``, in [0, 1]."""
    total = values.square().sum()
    return float((values[rank:].square().sum() / total).sqrt()) if total > 0 else 0.0


def decompose(delta: Delta) -> tuple[Float[Tensor, "fan_out rank"], Float[Tensor, " rank"], Float[Tensor, "rank fan_in"]]:
    """``U, S, V^T``, thin: of factors by QR and an SVD of their small core, float64; of a matrix in float32 at least."""
    if isinstance(delta, DenseDelta):
        left, values, right = torch.linalg.svd(delta.delta(), full_matrices=False)
        return left, values, right
    q_up, r_up = torch.linalg.qr(delta.up.double() * delta.scale)
    q_down, r_down = torch.linalg.qr(delta.down.double().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return q_up @ left, values, right @ q_down.T


def numerical_rank(values: Float[Tensor, " rank"], shape: tuple[int, int]) -> int:
    """How many singular values are above rounding, ``max(shape) * eps * largest``, with float32's eps at least; 0 for zero."""
    eps = max(torch.finfo(values.dtype).eps, torch.finfo(torch.float32).eps)
    return int((values > max(shape) * eps * values[:1].sum()).sum())


def trimmed(lora: LoraFactors) -> LoraFactors:
    """The same change with no more rank than it needs; rank 0 if it is zero."""
    left, values, right = decompose(lora)
    return _balanced(left, values, right, numerical_rank(values, lora.shape))


def _balanced(left: Tensor, values: Tensor, right: Tensor, rank: int) -> LoraFactors:
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    sign = left[:, :rank].gather(0, left[:, :rank].abs().argmax(0, keepdim=True)).sign()  # the largest entry of each column > 0
    return LoraFactors((down * sign.T).float(), (up * sign).float(), 1.0)
