"""Singular value decompositions with reproducible signs: exact, or randomized from a generator that was handed in."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import check_range


class Spectrum(NamedTuple):
    """``matrix ~ u @ diag(s) @ vh``, singular values descending; the largest entry of each column of ``u`` is positive."""

    u: Float[Tensor, "fan_out rank"]
    s: Float[Tensor, " rank"]
    vh: Float[Tensor, "rank fan_in"]


def exact_svd(matrix: Float[Tensor, "fan_out fan_in"]) -> Spectrum:
    """The economy decomposition of all ``min(fan_out, fan_in)`` triplets, in float32, or in float64 if that is the input's."""
    return _signed(*torch.linalg.svd(_wide(matrix), full_matrices=False))


def randomized_svd(
    matrix: Float[Tensor, "fan_out fan_in"], rank: int, *, niter: int, oversample: int, generator: torch.Generator
) -> Spectrum:
    """The leading ``rank`` triplets, approximately, from a random sketch of ``rank + oversample`` columns.

    ``niter`` rounds of subspace iteration, each orthonormalized, sharpen it: the error falls with
    ``(s[rank] / s[rank - 1]) ** (2 niter + 1)``, so a flat spectrum needs more of them.

    Raises: ValueError for a rank outside ``[1, min(shape)]``, or a negative ``niter`` or ``oversample``.
    Source: Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4.
    """
    check_range("randomized_svd.rank", rank, low=1, high=min(matrix.shape), hint=f"The matrix is {tuple(matrix.shape)}.")
    check_range("randomized_svd.niter", niter, low=0)
    check_range("randomized_svd.oversample", oversample, low=0)
    wide = _wide(matrix)
    columns = min(rank + oversample, *wide.shape)
    sketch = torch.randn(wide.shape[1], columns, generator=generator, dtype=wide.dtype, device=generator.device).to(wide.device)
    basis = torch.linalg.qr(wide @ sketch).Q
    for _ in range(niter):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ wide, full_matrices=False)
    return _signed((basis @ u)[:, :rank], s[:rank], vh[:rank])


def _wide(matrix: Tensor) -> Tensor:
    return matrix.detach() if matrix.dtype == torch.float64 else matrix.detach().float()


def _signed(u: Tensor, s: Tensor, vh: Tensor) -> Spectrum:
    flip = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()  # the same signs on every BLAS
    return Spectrum(u * flip, s, vh * flip.T)
