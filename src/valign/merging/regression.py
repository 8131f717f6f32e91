"""The linear system behind regression fusion of one layer: assembled, factorized, and solved for a change of weight.

See `valign.merging.regmean` for the equations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.linalg.lapack import dpocon
from torch import Tensor

from valign.checks import UserError
from valign.merging.deltas import Delta, DenseDelta
from valign.models.files.adapter_files import LoraFactors

RIDGE = 1e-4  # mu as a share of the mean eigenvalue of G_P
WORST_CONDITION = 1e12  # beyond it float64 has fewer than four digits left


@dataclass(frozen=True)
class Edit:
    """Token states of what is edited, and how far a layer's outputs are to move there (``W (g - e)``)."""

    states: Float[Tensor, "edit fan_in"]
    moves: Float[Tensor, "edit fan_out"]
    weight: float = 1.0


@dataclass(frozen=True)
class NormalEquations:
    """``M`` of one layer's inputs, factorized once for all layers that read the same."""

    triangle: Float[Tensor, "fan_in fan_in"]  # lower Cholesky factor, float64
    condition: float  # of M, in the 1-norm, estimated

    def divide(self, rows: Float[Tensor, "row fan_in"]) -> Float[Tensor, "row fan_in"]:
        """``rows M^-1``, float64."""
        return torch.cholesky_solve(rows.double().T, self.triangle).T


def assemble(
    moments: Sequence[Float[Tensor, "fan_in fan_in"]],
    preserve: Float[Tensor, "fan_in fan_in"] | None,
    *,
    lam: float = 1.0,
    ridge: float = RIDGE,
    edit: Edit | None = None,
    name: str = "the layer",
) -> NormalEquations:
    """``M = sum of moments + lam preserve + a sum e e^T + mu I``, factorized. Raises: UserError if it is (nearly) singular."""
    parts = [part.double() for part in moments]
    kept = preserve.double() if preserve is not None else None
    scale = kept if kept is not None else sum(parts[1:], start=parts[0])
    matrix = torch.eye(len(scale), dtype=torch.float64) * (ridge * float(scale.diagonal().mean()))
    for part in parts:
        matrix += part
    if kept is not None:
        matrix += lam * kept
    if edit is not None:
        states = edit.states.double()
        matrix += edit.weight * states.T @ states
    triangle, failed = torch.linalg.cholesky_ex(matrix)
    inverse_condition = 0.0
    if not failed:
        inverse_condition, _ = dpocon(triangle.numpy(), float(torch.linalg.matrix_norm(matrix, 1)), uplo="L")
    if not inverse_condition > 1 / WORST_CONDITION:
        number = f"{1 / inverse_condition:.1e}" if inverse_condition else "infinity"
        raise UserError(
            f"regmean: the system of {name} must be well conditioned, got the condition number {number} (at most "
            f"{WORST_CONDITION:.0e}). Give more prompts or captions, or raise lam or ridge."
        )
    return NormalEquations(triangle, 1 / inverse_condition)


def fuse(
    parts: Sequence[Delta], moments: Sequence[Float[Tensor, "fan_in fan_in"]], system: NormalEquations, *, edit: Edit | None = None
) -> Delta:
    """X of one module; float32. Low-rank where all parts are; its rank is the sum of theirs and the number of edited states."""
    factors = [part for part in parts if isinstance(part, LoraFactors)]
    if len(factors) < len(parts):
        right = torch.stack([part.delta().double() @ gram.double() for part, gram in zip(parts, moments)]).sum(0)
        if edit is not None:
            right = right + edit.weight * edit.moves.double().T @ edit.states.double()
        return DenseDelta(system.divide(right).float())
    downs = [part.down.double() @ gram.double() for part, gram in zip(factors, moments)]
    ups = [part.folded().up for part in factors]
    if edit is not None:
        downs.append(edit.states.double())
        ups.append((edit.weight * edit.moves.double().T).float())
    return LoraFactors(system.divide(torch.cat(downs)).float(), torch.cat(ups, dim=1), 1.0)
