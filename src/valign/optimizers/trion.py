"""Orthogonalized momentum in a few cosines (Trion, arXiv 2505.17967)."""

from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from valign.checks import check_choice, check_range
from valign.methods import Method
from valign.optimizers.base import (
    Groups,
    MatrixOptimizer,
    OptimizerOptions,
    adam_update,
    as_matrix,
    build_by_rank,
    check_numbers,
    check_parameters,
    goes_left,
    is_matrix,
)
from valign.optimizers.dct import Side, Transform, coordinates, newton_schulz, select, vectors

METHOD = Method(
    slug="trion",
    title="Trion: Muon's orthogonalized momentum in the best cosines",
    paper="arXiv 2505.17967",
    room="optimizers",
    entry="valign.optimizers.trion:Trion",
    fidelity="exact",
    note="the paper's formulas, as the reference code does not run; the default scale is ours",
)

Scale = Literal["none", "kj", "kimi", "dion"]
PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def shape_scale(rows: int, columns: int, kind: Scale) -> float:
    """Factor on the update of a ``fan_out x fan_in`` matrix: 1, ``sqrt(max(1, rows / columns))``, ``0.2 sqrt(max)``,
    ``sqrt(rows / columns)``."""
    scales = {
        "none": 1.0,
        "kj": sqrt(max(1.0, rows / columns)),
        "kimi": 0.2 * sqrt(max(rows, columns)),
        "dion": sqrt(rows / columns),
    }
    check_choice("shape_scale.kind", kind, scales)
    return scales[kind]


class Trion(MatrixOptimizer):
    """``M <- M + G``; ``b`` = the ``rank`` strongest cosine coordinates of ``M``; ``M <- M - (1 - mu) b Q_r^T``; move by
    ``NS(b) Q_r^T``.

    What the cosines leave out stays in ``M`` whole, so nothing is lost. ``NS`` is Muon's Newton-Schulz, run on the thin ``b``,
    and the move is ``lr * scale`` of it, after decoupled weight decay. Vectors, scalars and matrices with a dimension from
    ``max_dim`` on get Adam with ``adam_lr``. The reference code of this optimizer does not run, so this follows its formulas.

    Args:
        rank: Cosines per matrix, in [1, min(rows, columns)].
        momentum: ``mu``, the share of the kept part that stays in ``M``, [0, 1).
        scale: See `shape_scale`.
        precision: Of the Newton-Schulz iteration.
    Raises: as `DCTAdamW`.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        rank: int,
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        scale: Scale = "kj",
        norm: int = 2,
        transform: Transform = "matmul",
        side: Side = "auto",
        newton_schulz_steps: int = 5,
        precision: Literal["bfloat16", "float32", "float64"] = "bfloat16",
        adam_lr: float = 3e-4,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-10,
        max_dim: int = 32_000,
    ) -> None:
        numbers = {"rank": rank, "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "norm": norm, "max_dim": max_dim}
        choices = {"scale": scale, "transform": transform, "side": side, "precision": precision}
        adam = {"adam_lr": adam_lr, "adam_betas": adam_betas, "adam_eps": adam_eps}
        super().__init__(params, {**numbers, **choices, **adam, "newton_schulz_steps": newton_schulz_steps})

    def check(self, group: dict[str, Any]) -> None:
        one, two = group["adam_betas"]
        check_numbers("Trion", lr=group["lr"], weight_decay=group["weight_decay"], beta1=one, beta2=two)
        check_numbers("Trion", adam_lr=group["adam_lr"], adam_eps=group["adam_eps"])
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"Trion.momentum must be in [0, 1), got {group['momentum']!r}.")
        check_choice("Trion.scale", group["scale"], ("none", "kj", "kimi", "dion"))
        check_choice("Trion.norm", group["norm"], (1, 2))
        check_choice("Trion.transform", group["transform"], ("matmul", "fft"))
        check_choice("Trion.side", group["side"], ("auto", "left", "right"))
        check_choice("Trion.precision", group["precision"], PRECISIONS)
        check_range("Trion.newton_schulz_steps", group["newton_schulz_steps"], low=1)
        check_range("Trion.rank", group["rank"], low=1)
        check_parameters("Trion", group, group["rank"], group["max_dim"])

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, float]:
        if is_matrix(parameter, group["max_dim"]):
            return _orthogonal(as_matrix(gradient), state, group), float(group["lr"])
        return adam_update(state, gradient, betas=group["adam_betas"], eps=group["adam_eps"]), group["adam_lr"]


def _orthogonal(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    left = goes_left(gradient, group["side"])
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(gradient)
    state["momentum"] += gradient
    momentum = state["momentum"].T if left else state["momentum"]  # a view: what is taken off below stays off
    found = coordinates(momentum, "dct2", group["transform"])
    chosen = select(found, group["rank"], norm=group["norm"])
    small, kept = found[:, chosen], vectors(momentum.shape[1], "dct2", momentum)[:, chosen]
    momentum -= (1 - group["momentum"]) * (small @ kept.T)
    update = newton_schulz(small, steps=group["newton_schulz_steps"], dtype=PRECISIONS[group["precision"]]) @ kept.T
    return shape_scale(gradient.shape[0], gradient.shape[1], group["scale"]) * (update.T if left else update)


@dataclass(frozen=True, kw_only=True)
class TrionOptions(OptimizerOptions):
    """`Trion`."""

    learning_rate: float | None = 1e-3  # a step of 1 has singular values near 1, so AdamW's rates would hardly move a matrix
    weight_decay: float = 0.0
    rank: int = 32
    momentum: float = 0.95
    scale: Scale = "kj"

    def build(self, groups: Groups, head: Groups, lr: float) -> torch.optim.Optimizer:
        head = [{**group, "adam_lr": group["lr"], "adam_betas": (0.9, 0.999)} for group in head]
        return build_by_rank(Trion, self, groups, head, lr)
