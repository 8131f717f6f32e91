"""The cosine basis that the DCT optimizers select from, what is kept of a gradient, and a store for what is not.

Everything here is right-sided: a matrix whose *columns* are the shorter dimension; callers transpose where needed.
"""

from functools import lru_cache
from math import pi, sqrt
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from valign.checks import check_choice, check_range

Basis = Literal["dct2", "dct3"]
Transform = Literal["matmul", "fft"]
Side = Literal["auto", "left", "right"]
Feedback = Literal["none", "full", "bf16", "8bit", "4bit"]
LEVELS = {"8bit": 255, "4bit": 15}


@lru_cache(maxsize=64)
def dct_matrix(n: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Float[Tensor, "n n"]:
    """The orthonormal DCT-II: rows are cosines, ``C[i, j] = sqrt(2 / n) cos(pi i (2 j + 1) / (2 n))``, row 0 divided by sqrt 2.

    Built in float64, then cast; one per size, kind and device, shared by all layers.
    """
    check_range("dct_matrix.n", n, low=1)
    index = torch.arange(n, dtype=torch.float64)
    matrix = (pi * index[:, None] * (2 * index + 1) / (2 * n)).cos() * sqrt(2 / n)
    matrix[0] /= sqrt(2)
    return matrix.to(device=device, dtype=dtype)


def dct_rows(x: Float[Tensor, "row n"]) -> Float[Tensor, "row n"]:
    """Orthonormal DCT-II of each row by one FFT of the same length, O(n log n) a row; half precision is computed in float32.

    Source: Makhoul, "A fast cosine transform in one and two dimensions", IEEE TASSP 28 (1980).
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    n = wide.shape[1]
    folded = torch.cat([wide[:, ::2], wide[:, 1::2].flip(1)], dim=1)  # x0 x2 x4 ... x5 x3 x1
    angle = torch.arange(n, dtype=torch.float64, device=x.device) * (pi / (2 * n))
    scale = torch.full((n,), sqrt(2 / n), dtype=torch.float64, device=x.device)
    scale[0] = sqrt(1 / n)
    found = torch.fft.fft(folded, dim=1)
    return (found.real * (angle.cos() * scale).to(wide.dtype) + found.imag * (angle.sin() * scale).to(wide.dtype)).to(x.dtype)


def vectors(n: int, basis: Basis, like: Tensor) -> Float[Tensor, "n n"]:
    """The basis vectors as *columns*: cosines for ``"dct2"``; ``"dct3"``, the columns of the DCT-II matrix, is the reference
    code's."""
    matrix = dct_matrix(n, like.dtype, str(like.device))
    return matrix.T if basis == "dct2" else matrix


def coordinates(matrix: Float[Tensor, "row n"], basis: Basis, transform: Transform) -> Float[Tensor, "row n"]:
    """``matrix @ vectors``."""
    if transform == "fft":
        return dct_rows(matrix)
    return matrix @ vectors(matrix.shape[1], basis, matrix)


def select(found: Float[Tensor, "row n"], rank: int, *, norm: int = 2) -> Int[Tensor, " rank"]:
    """The ``rank`` columns of largest ``norm``, ascending; of equals the first.

    With norm 2 no other choice loses less: ``|G - kept|^2 = |G|^2 - sum of |column|^2`` over what is kept, as the basis is
    orthogonal,
    so the error is at most ``sqrt(1 - rank / n) |G|``. Norm 1 is the reference code's heuristic without that bound.
    """
    scores = torch.linalg.vector_norm(found, ord=norm, dim=0)
    return scores.sort(descending=True, stable=True).indices[:rank].sort().values


def carry(moment: Float[Tensor, "row rank"], old: Int[Tensor, " rank"], new: Int[Tensor, " rank"]) -> Float[Tensor, "row rank"]:
    """Moments of the basis vectors that stay selected, in their new places; zero for new ones.

    That is ``moment @ Q_old^T Q_new``, a matrix of zeros and ones since the basis is fixed. Both index lists are ascending.
    """
    place = torch.searchsorted(old, new).clamp(max=len(old) - 1)
    return moment[:, place] * (old[place] == new)


class Packed(NamedTuple):
    """A matrix in 8 or 4 bits a number, each row with its own range."""

    codes: UInt8[Tensor, "row byte"]
    low: Float[Tensor, "row 1"]
    unit: Float[Tensor, "row 1"]


def pack(matrix: Float[Tensor, "row n"], bits: Literal["8bit", "4bit"]) -> Packed:
    """Round each row to 256 or 16 even steps between its least and its largest number: the error is at most half a step.

    Raises: ValueError for 4 bits and an odd row.
    """
    check_choice("pack.bits", bits, LEVELS)
    if bits == "4bit" and matrix.shape[1] % 2:
        raise ValueError(f"pack must have rows of even length for 4 bits, got {matrix.shape[1]}. Use 8 bits.")
    wide = matrix.float()
    low, high = wide.amin(1, keepdim=True), wide.amax(1, keepdim=True)
    unit = (high - low) / LEVELS[bits]
    codes = ((wide - low) / torch.where(unit > 0, unit, 1.0) + 0.5).floor().clamp(0, LEVELS[bits]).to(torch.uint8)
    if bits == "4bit":
        codes = codes[:, ::2] | (codes[:, 1::2] << 4)
    return Packed(codes, low, unit)


def unpack(packed: Packed, bits: Literal["8bit", "4bit"]) -> Float[Tensor, "row n"]:
    """Undo `pack`, float32."""
    codes = packed.codes
    if bits == "4bit":
        codes = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)
    return packed.low + codes.float() * packed.unit


def remember(state: dict[str, Any], error: Float[Tensor, "row n"], kind: Feedback) -> None:
    """Store what a projection left out in ``state``."""
    if kind == "8bit" or kind == "4bit":
        state["error_codes"], state["error_low"], state["error_unit"] = pack(error, kind)
    elif kind != "none":
        state["error"] = error.to(torch.bfloat16) if kind == "bf16" else error


def recall(state: dict[str, Any], kind: Feedback, like: Tensor) -> Tensor:
    """What `remember` stored, in ``like``'s dtype; zeros before the first time."""
    if (kind == "8bit" or kind == "4bit") and "error_codes" in state:
        return unpack(Packed(state["error_codes"], state["error_low"], state["error_unit"]), kind).to(like.dtype)
    return state["error"].to(like.dtype) if "error" in state else torch.zeros_like(like)


def newton_schulz(
    matrix: Float[Tensor, "row column"], *, steps: int = 5, dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "row column"]:
    """Push every singular value towards 1 (to about [0.7, 1.2]) with the quintic of Muon; ``U V^T`` without an SVD.

    Source: Jordan et al., "Muon", 2024; coefficients 3.4445, -4.7750, 2.0315.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrix.T if matrix.shape[0] > matrix.shape[1] else matrix).to(dtype)
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)
