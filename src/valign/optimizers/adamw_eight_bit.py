"""AdamW with its state in 8 bits a number (Dettmers et al., arXiv 2110.02861), by bitsandbytes."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from valign.checks import UserError
from valign.optimizers.base import Groups, OptimizerOptions


@dataclass(frozen=True, kw_only=True)
class AdamWEightBitOptions(OptimizerOptions):
    """AdamW whose two moments take 2 bytes a trained number instead of 8; parameters below 4096 numbers keep 32 bits."""

    learning_rate: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)

    def check_installed(self) -> None:
        if find_spec("bitsandbytes") is None:
            raise UserError(
                "AdamW with 8-bit state needs the package bitsandbytes, which is missing. pip install 'valign[eight-bit]'."
            )

    def build(self, groups: Groups, head: Groups, lr: float) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit

        made: torch.optim.Optimizer = AdamW8bit([*groups, *head], lr=lr, betas=self.betas, weight_decay=self.weight_decay)
        return made
