"""AdamW whose moments live in a few cosines chosen anew each step (DCT-AdamW, arXiv 2505.17967)."""

from dataclasses import dataclass
from typing import Any

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
from valign.optimizers.dct import Basis, Feedback, Side, Transform, carry, coordinates, recall, remember, select, vectors

METHOD = Method(
    slug="dct-adamw",
    title="DCT-AdamW: Adam's moments in the best cosines of each gradient",
    paper="arXiv 2505.17967",
    room="optimizers",
    entry="valign.optimizers.dct_adamw:DCTAdamW",
    fidelity="variant",
    note="the orthonormal DCT-II, and the norm that loses least; the reference code's basis and norm are settings",
)


class DCTAdamW(MatrixOptimizer):
    """AdamW on ``a = (grad + E) Q[:, I]``: ``I`` are the ``rank`` strongest of ``n = min(rows, columns)`` cosines, ``E`` what
    was left out.

    Per matrix the states are two of ``[rows, rank]`` or ``[rank, columns]``, ``rank`` integers, and the error feedback. No SVD, no
    stored projection. Moments follow their cosine when the choice changes (``rotate``). The update ``u Q[:, I]^T`` has that rank.
    Vectors, scalars and matrices with a dimension from ``max_dim`` on (embeddings) get plain AdamW; kernels of convolutions are
    matrices ``[fan_out, rest]``.

    The cosines come near an SVD only where neighbouring columns are alike; for a generic low-rank gradient they are no better
    than a random basis.

    Args:
        rank: Cosines per matrix, in [1, min(rows, columns)].
        lr: Learning rate. weight_decay: Decoupled, applied before the update.
        update_every: Steps between two choices of cosines.
        feedback: How ``E`` is stored: ``"none"`` drops it, ``"full"`` is exact, ``"bf16"``, ``"8bit"`` and ``"4bit"`` save memory.
        norm: 2 loses least; 1 is the reference code's.
        basis: ``"dct3"`` with ``norm=1, rotate=False, feedback="none"`` is the reference code's default.
        transform: ``"fft"`` costs O(n log n) a row in place of O(n^2); cosines only.
        side: Which dimension is projected; ``"auto"`` the shorter.
    Raises: ValueError for numbers outside their range, naming the parameter where the rank does not fit; TypeError for integer or
        complex parameters and sparse gradients.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        rank: int,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        update_every: int = 1,
        rotate: bool = True,
        feedback: Feedback = "bf16",
        norm: int = 2,
        basis: Basis = "dct2",
        transform: Transform = "matmul",
        side: Side = "auto",
        max_dim: int = 32_000,
    ) -> None:
        defaults = {"rank": rank, "lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "update_every": update_every}
        choices = {"rotate": rotate, "feedback": feedback, "norm": norm, "basis": basis, "transform": transform, "side": side}
        super().__init__(params, {**defaults, **choices, "max_dim": max_dim})

    def check(self, group: dict[str, Any]) -> None:
        one, two = group["betas"]
        check_numbers("DCTAdamW", lr=group["lr"], eps=group["eps"], weight_decay=group["weight_decay"], beta1=one, beta2=two)
        check_range("DCTAdamW.update_every", group["update_every"], low=1)
        check_choice("DCTAdamW.norm", group["norm"], (1, 2))
        check_choice("DCTAdamW.feedback", group["feedback"], ("none", "full", "bf16", "8bit", "4bit"))
        check_choice("DCTAdamW.basis", group["basis"], ("dct2", "dct3"))
        check_choice("DCTAdamW.transform", group["transform"], ("matmul", "fft"))
        check_choice("DCTAdamW.side", group["side"], ("auto", "left", "right"))
        if group["transform"] == "fft" and group["basis"] != "dct2":
            raise ValueError(
                f"DCTAdamW.transform must be 'matmul' with basis {group['basis']!r}, got 'fft'. It computes cosines only."
            )
        check_range("DCTAdamW.rank", group["rank"], low=1)
        check_parameters("DCTAdamW", group, group["rank"], group["max_dim"])
        if group["feedback"] == "4bit":
            for parameter in group["params"]:
                matrix = as_matrix(parameter)
                columns = matrix.shape[0] if goes_left(matrix, group["side"]) else matrix.shape[1]
                if is_matrix(parameter, group["max_dim"]) and columns % 2:
                    raise ValueError(
                        f"DCTAdamW.feedback must be '8bit' for a matrix of {tuple(matrix.shape)}, got '4bit'. {columns} is odd."
                    )

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, float]:
        if is_matrix(parameter, group["max_dim"]):
            return _low_rank(as_matrix(gradient), state, group), float(group["lr"])
        return adam_update(state, gradient, betas=group["betas"], eps=group["eps"]), float(group["lr"])


def _low_rank(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    left, step = goes_left(gradient, group["side"]), state["step"]

    def turned(matrix: Tensor) -> Tensor:
        return matrix.T if left else matrix

    full = turned(gradient)
    if group["feedback"] != "none":
        full = full + recall(state, group["feedback"], full)
    basis = vectors(full.shape[1], group["basis"], full)
    if step == 1 or step % group["update_every"] == 0:
        found = coordinates(full, group["basis"], group["transform"])
        chosen = select(found, group["rank"], norm=group["norm"])
        if step > 1 and group["rotate"]:
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = turned(carry(turned(state[moment]), state["indices"], chosen))
        state["indices"], small = chosen, found[:, chosen]
    else:
        small = full @ basis[:, state["indices"]]
    kept = basis[:, state["indices"]]
    if group["feedback"] != "none":
        remember(state, full - small @ kept.T, group["feedback"])
    return turned(turned(adam_update(state, turned(small), betas=group["betas"], eps=group["eps"])) @ kept.T)


@dataclass(frozen=True, kw_only=True)
class DCTAdamWOptions(OptimizerOptions):
    """`DCTAdamW`."""

    learning_rate: float | None = None
    weight_decay: float = 0.0
    rank: int = 32  # cosines per matrix; all of them where a matrix is smaller
    update_every: int = 1
    feedback: Feedback = "bf16"

    def build(self, groups: Groups, head: Groups, lr: float) -> torch.optim.Optimizer:
        return build_by_rank(DCTAdamW, self, groups, head, lr)
