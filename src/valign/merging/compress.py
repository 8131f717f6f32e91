"""Lower the rank of a change of weight with the least error possible (Eckart-Young), and return that error."""

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import check_range
from valign.merging.deltas import Delta, DenseDelta
from valign.models.files.adapter_files import LoraFactors


def spectrum(delta: Delta) -> Float[Tensor, " rank"]:
    """Singular values of a change of weight, descending, float64; of factors at most ``rank``, from their small core alone."""
    return torch.linalg.svdvals(delta.matrix.double()) if isinstance(delta, DenseDelta) else _core(delta)[1]


def compress(lora: LoraFactors, rank: int) -> tuple[LoraFactors, float]:
    """The best approximation of rank ``rank``, and its relative error ``|delta - result| / |delta|`` (Frobenius; 0 for zero).

    QR of both factors and an SVD of the small core, in float64: cost ``O((fan_out + fan_in) r^2)``, no dense matrix. The singular
    values are split evenly (``U sqrt(S)``, ``sqrt(S) V^T``), with signs that do not depend on the linear-algebra library.
    Raises: ValueError if ``rank`` is not in [1, the adapter's rank].
    """
    check_range("compress.rank", rank, low=1, high=lora.rank, hint="More than the factors hold would change nothing.")
    left, values, right = _core(lora)
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


def _core(lora: LoraFactors) -> tuple[Tensor, Tensor, Tensor]:
    """``U, S, V^T`` of the delta, float64."""
    q_up, r_up = torch.linalg.qr(lora.up.double() * lora.scale)
    q_down, r_down = torch.linalg.qr(lora.down.double().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return q_up @ left, values, right @ q_down.T


def _balanced(left: Tensor, values: Tensor, right: Tensor, rank: int) -> LoraFactors:
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    sign = left[:, :rank].gather(0, left[:, :rank].abs().argmax(0, keepdim=True)).sign()  # the largest entry of each column > 0
    return LoraFactors((down * sign.T).float(), (up * sign).float(), 1.0)
