"""AdamW whose moments live in the gradient's top singular directions (GaLore, arXiv 2403.03507), the baseline of DCT-AdamW."""

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
from valign.optimizers.dct import Side

METHOD = Method(
    slug="galore",
    title="GaLore: Adam's moments in the gradient's top singular directions",
    paper="arXiv 2403.03507",
    room="optimizers",
    entry="valign.optimizers.galore:GaLore",
    fidelity="exact",
    note="projection, renewal and moments as in the authors' code",
)


class GaLore(MatrixOptimizer):
    """AdamW on ``a = G P`` with ``P`` the ``rank`` top right singular vectors of a gradient; the move is ``scale * u P^T``.

    ``P`` is renewed by an SVD every ``update_every`` steps and stored, ``n rank`` numbers per matrix beside the moments'
    ``2 rank m``; moments keep their places when it changes, as in the authors' code. The shorter dimension is projected. Vectors,
    scalars and matrices with a dimension from ``max_dim`` on get plain AdamW.

    Args:
        rank: Directions per matrix, in [1, min(rows, columns)].
        update_every: Steps between two SVDs; 200 in the paper.
        scale: The paper's alpha, a factor on the move.
    Raises: as `DCTAdamW`.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        rank: int,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        update_every: int = 200,
        scale: float = 0.25,
        side: Side = "auto",
        max_dim: int = 32_000,
    ) -> None:
        numbers = {"rank": rank, "lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, {**numbers, "update_every": update_every, "scale": scale, "side": side, "max_dim": max_dim})

    def check(self, group: dict[str, Any]) -> None:
        one, two = group["betas"]
        check_numbers("GaLore", lr=group["lr"], eps=group["eps"], weight_decay=group["weight_decay"], beta1=one, beta2=two)
        check_range("GaLore.update_every", group["update_every"], low=1)
        check_range("GaLore.scale", group["scale"], above=0)
        check_choice("GaLore.side", group["side"], ("auto", "left", "right"))
        check_range("GaLore.rank", group["rank"], low=1)
        check_parameters("GaLore", group, group["rank"], group["max_dim"])

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, float]:
        if is_matrix(parameter, group["max_dim"]):
            return group["scale"] * _projected(as_matrix(gradient), state, group), float(group["lr"])
        return adam_update(state, gradient, betas=group["betas"], eps=group["eps"]), float(group["lr"])


def _projected(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    left = goes_left(gradient, group["side"])
    full = gradient.T if left else gradient
    if (state["step"] - 1) % group["update_every"] == 0:
        state["projection"] = torch.linalg.svd(full, full_matrices=False).Vh[: group["rank"]].T.contiguous()
    kept = state["projection"]
    update = adam_update(state, full @ kept, betas=group["betas"], eps=group["eps"]) @ kept.T
    return update.T if left else update


@dataclass(frozen=True, kw_only=True)
class GaLoreOptions(OptimizerOptions):
    """`GaLore`."""

    learning_rate: float | None = None
    weight_decay: float = 0.0
    rank: int = 32
    update_every: int = 200
    scale: float = 1.0  # not the paper's 0.25, so that AdamW's learning rates fit

    def build(self, groups: Groups, head: Groups, lr: float) -> torch.optim.Optimizer:
        return build_by_rank(GaLore, self, groups, head, lr)
