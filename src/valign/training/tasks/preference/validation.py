"""Cheap validation on held-out pairs: no sampling, the same draws every time, so that two steps are compared on equal terms."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from valign.objectives import PairErrors, denoising_error
from valign.training.engine.processes import reduce_sum
from valign.training.tasks.preference.batches import Images, PairBatch, PairSource
from valign.training.tasks.preference.pair_step import PairStep, weigh


@dataclass
class Validator:
    """Loss, accuracy and displacement on held-out pairs, and the **drift** on prompts that should not change.

    ``drift = sum |policy - base|^2 / sum |base - target|^2`` over the winners under their *safe* captions: how far the prediction
    on harmless input has moved, in units of the base model's own error there; 0 at step 0. Base errors and predictions are kept.
    """

    step: PairStep
    source: PairSource
    batch: int  # pairs per forward
    _base: list[tuple[Float[Tensor, " image"], Float[Tensor, "pair channel height width"]]] = field(default_factory=list)

    def __call__(self) -> dict[str, float]:
        """``val_loss``, ``val_accuracy``, ``val_displacement`` (winner's, relative), ``drift``; equal on every process."""
        device, totals = self.step.accelerator.device, torch.zeros(7, dtype=torch.float64)
        for index, places in enumerate(self._parts()):
            pairs, safe = self._batches(places)
            if index == len(self._base):
                self._base.append((self.step.errors(pairs, reference=True), self.step.predict(safe, reference=True).cpu()))
            reference, base = self._base[index]
            base = base.to(device)
            errors = PairErrors.split(self.step.errors(pairs, reference=False), reference)
            loss, _ = weigh(errors, self.step.objective, weight=pairs.weight, sft_weight=self.step.config.sft_weight)
            moved = denoising_error(self.step.predict(safe, reference=False), base)
            rows = (
                torch.ones_like(loss),
                loss,
                (errors.advantage > 0).float(),
                errors.policy_w - errors.ref_w,
                errors.ref_w,
                moved,
                denoising_error(base, safe.target),
            )
            totals += torch.stack([row.double().sum() for row in rows]).cpu()
        count, loss, ranked, gap, reference, moved, own = reduce_sum(self.step.accelerator, totals.float().to(device)).tolist()
        return {
            "val_loss": loss / count,
            "val_accuracy": ranked / count,
            "val_displacement": gap / reference,
            "drift": moved / own,
        }

    def _parts(self) -> list[list[tuple[int, int]]]:
        """This process' part of all (pair, draw), cut into batches."""
        config, accelerator = self.step.config, self.step.accelerator
        pairs = range(min(len(self.source), config.val_pairs))
        places = [(pair, draw) for pair in pairs for draw in range(config.val_draws)]
        mine = places[accelerator.process_index :: accelerator.num_processes]
        return [mine[start : start + self.batch] for start in range(0, len(mine), self.batch)]

    def _batches(self, places: list[tuple[int, int]]) -> tuple[PairBatch, Images]:
        draws = self.step.config.val_draws
        safe = self.source.validation(places, draws, safe_caption=True).pieces(split=True)[0]  # the winners
        return self.source.validation(places, draws), safe
