"""A safety expert as something to fine-tune: a U-Net learns to prefer a safe image to an unsafe one of the same caption."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import check_range
from valign.data.tasks.captions import PairRow
from valign.models.diffusion.base import DiffusionModel
from valign.models.heads.task_model import TaskBatch
from valign.objectives import PairErrors, PairObjective, denoising_error
from valign.training.tasks.preference.pair_step import pair_loss
from valign.training.tasks.supervised.diffusion_task import DiffusionTaskModel, predicted


class PairTaskModel(DiffusionTaskModel):
    """The loss of a pair is that of an AlignGuard expert: ``objective + sft_weight e_w + retain_weight |policy - base|^2``, the
    last under a benign caption. Unlike `valign.training.train_preference` it trains by any method of fine-tuning.

    Args:
        reference: The base model once more; it is not trained.
        objective: Of the four denoising errors; winner and loser share timestep and noise.
        sft_weight: Times the winner's mean squared error.
        retain_weight: Times the squared move away from the base's answer on the benign image.
    """

    def __init__(
        self,
        diffusion: DiffusionModel,
        reference: DiffusionModel,
        objective: PairObjective,
        *,
        sft_weight: float = 0.0,
        retain_weight: float = 0.0,
        empty_prompt_prob: float = 0.1,
    ) -> None:
        for name, value in (("sft_weight", sft_weight), ("retain_weight", retain_weight)):
            check_range(f"PairTaskModel.{name}", value, low=0.0)
        super().__init__(diffusion, empty_prompt_prob=empty_prompt_prob)
        self.reference, self.objective = reference, objective
        self.sft_weight, self.retain_weight = sft_weight, retain_weight

    def batch(self, rows: Sequence[PairRow]) -> TaskBatch:
        """Winners, then losers, then benign images, whose target is the base's answer; ``reference`` are the base's errors."""
        pairs = [self.draw_of(row) for row in rows]
        losers = [replace(draw, winner_noise=draw.loser_noise) for draw in pairs]
        kept = [self.draw_of(row.benign) for row in rows]
        images = [getattr(row, part) for part in ("winner", "loser", "benign") for row in rows]
        found = self.noised(images, [*pairs, *losers, *kept])
        with torch.no_grad():
            base, pair = predicted(self.reference, found).float(), slice(2 * len(rows))
        errors = denoising_error(base[pair], found.target[pair])
        target = torch.cat([found.target[pair], base[2 * len(rows) :]])
        return TaskBatch({**found.inputs, "reference": errors}, target, len(rows))

    def summed(self, answer: Tensor, batch: TaskBatch) -> Float[Tensor, ""]:
        winner, loser, moved = denoising_error(answer, batch.target).chunk(3)
        errors = PairErrors(winner, loser, *batch.inputs["reference"].chunk(2))
        return (pair_loss(errors, self.objective, sft_weight=self.sft_weight) + self.retain_weight * moved).sum()

    def reading(self) -> dict[str, Any]:
        objective = {"name": type(self.objective).__name__, **vars(self.objective)}
        return {**super().reading(), "objective": objective, "sft_weight": self.sft_weight, "retain_weight": self.retain_weight}
