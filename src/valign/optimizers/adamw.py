"""torch's AdamW."""

from dataclasses import dataclass

import torch

from valign.optimizers.base import Groups, OptimizerOptions


@dataclass(frozen=True, kw_only=True)
class AdamWOptions(OptimizerOptions):
    """Plain AdamW for every parameter."""

    learning_rate: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)

    def build(self, groups: Groups, head: Groups, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW([*groups, *head], lr=lr, betas=self.betas, weight_decay=self.weight_decay)
