"""transformers' Adafactor."""

from dataclasses import dataclass

import torch

from valign.optimizers.base import Groups, OptimizerOptions


@dataclass(frozen=True, kw_only=True)
class AdafactorOptions(OptimizerOptions):
    """Adafactor at a fixed rate, with its own clipping of updates at 1, as in AlignGuard's launchers for SDXL."""

    learning_rate: float | None = None
    weight_decay: float = 0.0

    def build(self, groups: Groups, head: Groups, lr: float) -> torch.optim.Optimizer:
        from transformers.optimization import Adafactor

        options = {"clip_threshold": 1.0, "scale_parameter": False, "relative_step": False}
        return Adafactor([*groups, *head], lr=lr, weight_decay=self.weight_decay, **options)
