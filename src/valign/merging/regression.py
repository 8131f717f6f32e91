"""Regression fusion in closed form: the normal equations of each layer, assembled, factorized and solved for a change of weight.

For the equations see `valign.merging.regmean`, which also collects what they are made of.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.linalg.lapack import dpocon
from torch import Tensor

from valign.checks import UserError, check_range
from valign.merging.compress import compress, compress_dense
from valign.merging.deltas import Delta, DenseDelta
from valign.merging.experts import Expert, compatible
from valign.merging.moments import Moments
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


def regmean(
    experts: Sequence[Expert],
    moments: Mapping[str, Moments] | Sequence[Moments],
    preserve: Moments | None,
    *,
    lam: float = 1.0,
    ridge: float = RIDGE,
    edits: Mapping[str, Edit] | None = None,
    rank: int | None = None,
    modules: Sequence[str] | None = None,
    errors: MutableMapping[str, float] | None = None,
    conditions: MutableMapping[str, float] | None = None,
    allow_base_mismatch: bool = False,
) -> Iterator[tuple[str, Delta]]:
    """Fuse experts in closed form, one module at a time in sorted order; solved in float64, answered in float32.

    Args:
        experts: Low-rank or dense changes; ``weight`` is s_i.
        moments: Per expert (by name, or in order) and module: second moments ``[fan_in, fan_in]`` of the layer's inputs on the
            expert's prompts. Layers that read the same should hold the same tensor: it is factorized once.
        preserve: The same of benign captions; None preserves nothing.
        lam: Weight of ``preserve``, at least 0.
        ridge: ``mu`` over the mean eigenvalue of ``preserve`` (of the experts' moments, where there is none), at least 0.
        edits: What else moves, by module.
        rank: Truncate each module to this rank, where it has more (`compress`).
        modules: Those to fuse; all of the experts' if left out.
        errors: Filled, module by module, with the relative Frobenius error of the truncation.
        conditions: Filled, module by module, with the condition number of the system.
    Raises: UserError if experts do not fit together, a layer's inputs were not collected or do not fit its shape; and, while it
        streams, for a system that is singular or worse conditioned than `WORST_CONDITION`.
    """
    check_range("regmean.lam", lam, low=0)
    check_range("regmean.ridge", ridge, low=0)
    adapted = compatible("regmean", experts, allow_base_mismatch=allow_base_mismatch)
    modules = adapted if modules is None else sorted(modules)
    if rank is not None:
        check_range("regmean.rank", rank, low=1)
    listed = _in_order(experts, moments)
    shapes = {module: experts[0].file.entries[module].shape[1] for module in modules}
    for name, found in (
        *zip((expert.name for expert in experts), listed),
        *([("the preserved captions", preserve)] if preserve else []),
    ):
        _check_moments(name, found, shapes)
    return _stream(experts, listed, preserve, modules, lam, ridge, edits or {}, rank, errors, conditions)


def _stream(
    experts: Sequence[Expert],
    moments: Sequence[Moments],
    preserve: Moments | None,
    modules: Sequence[str],
    lam: float,
    ridge: float,
    edits: Mapping[str, Edit],
    rank: int | None,
    errors: MutableMapping[str, float] | None,
    conditions: MutableMapping[str, float] | None,
) -> Iterator[tuple[str, Delta]]:
    solved: tuple[list[object], NormalEquations | None] = ([], None)  # of the last module: neighbours often read the same
    for module in modules:
        grams, kept, edit = [one[module] for one in moments], preserve[module] if preserve else None, edits.get(module)
        key: list[object] = [*grams, kept, edit and edit.states]
        same = len(key) == len(solved[0]) and all(mine is other for mine, other in zip(key, solved[0]))
        system = solved[1] if same and solved[1] else assemble(grams, kept, lam=lam, ridge=ridge, edit=edit, name=module)
        solved = (key, system)
        merged = fuse([expert.factors(module) for expert in experts], grams, system, edit=edit)
        error = 0.0
        if rank is not None and merged.rank > rank:
            merged, error = compress_dense(merged.matrix, rank) if isinstance(merged, DenseDelta) else compress(merged, rank)
        if errors is not None:
            errors[module] = error
        if conditions is not None:
            conditions[module] = system.condition
        yield module, merged


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


def _in_order(experts: Sequence[Expert], moments: Mapping[str, Moments] | Sequence[Moments]) -> list[Moments]:
    names = [expert.name for expert in experts]
    if not isinstance(moments, Mapping):
        moments = dict(zip(names, moments)) if len(moments) == len(names) else {}
    missing = [name for name in names if name not in moments]
    if missing:
        raise UserError(f"regmean.moments must hold second moments for every expert, got none for {', '.join(missing)}.")
    return [moments[name] for name in names]


def _check_moments(name: str, moments: Moments, widths: Mapping[str, int]) -> None:
    missing = sorted(set(widths) - set(moments))
    if missing:
        raise UserError(
            f"regmean.moments of {name} must hold every adapted layer, got none of {missing[0]} and {len(missing) - 1} more. "
            "Collect the inputs of these layers, too."
        )
    checked: set[int] = set()
    for module, width in widths.items():
        matrix = moments[module]
        if tuple(matrix.shape) != (width, width):
            raise UserError(
                f"regmean.moments of {name} must be [{width}, {width}] for {module}, got {list(matrix.shape)}. "
                "Collect them with the experts' own model."
            )
        if id(matrix) not in checked and not matrix.isfinite().all():
            raise UserError(f"regmean.moments of {name} must be finite, got NaN or infinity for {module}.")
        checked.add(id(matrix))
