"""One micro-batch: errors under reference and policy, the loss, and its gradient into the factors."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.lora import adapter_off
from valign.objectives import PairErrors, PairObjective, denoising_error, loser_scale
from valign.training.engine.processes import reduce_sum
from valign.training.tasks.preference.batches import Images, PairBatch
from valign.training.tasks.preference.config import PreferenceConfig

# What a step adds up over its pairs; divided by their number in the log.
SUMS = (
    "loss",
    "implicit_accuracy",
    "winner_error",
    "loser_error",
    "winner_reference",
    "loser_reference",
    "loser_scale",
    "retention",
)


def pair_loss(errors: PairErrors, objective: PairObjective, *, sft_weight: float) -> Float[Tensor, " pair"]:
    """``objective(errors) + sft_weight * e_w``, with gradients."""
    return objective(errors) + sft_weight * errors.policy_w


def weigh(
    errors: PairErrors, objective: PairObjective, *, weight: Float[Tensor, " pair"], sft_weight: float
) -> tuple[Float[Tensor, " pair"], Float[Tensor, " image"]]:
    """Loss per pair, and its derivative by each policy error (winners, then losers).

    The loss is `pair_loss` of ``weight * errors``. The derivatives are all that the backward pass needs:
    multiplied with the errors they give the gradient, at once or half by half.
    """
    policy = torch.cat([errors.policy_w, errors.policy_l]).detach().requires_grad_()
    with torch.enable_grad():
        winners, losers = policy.chunk(2)
        weighted = PairErrors(winners, losers, errors.ref_w, errors.ref_l).weighted(weight)
        loss = pair_loss(weighted, objective, sft_weight=sft_weight)
        (gradient,) = torch.autograd.grad(loss.sum(), policy)
    return loss.detach(), gradient


@dataclass(frozen=True)
class PairStep:
    """Forward and backward of pairs, on one process. All error arithmetic is float32."""

    model: DiffusionModel
    objective: PairObjective
    config: PreferenceConfig
    accelerator: Accelerator
    off: Callable[[Any], AbstractContextManager[Any]] = adapter_off  # inside, the model is exactly the reference

    def errors(self, batch: PairBatch, *, reference: bool) -> Float[Tensor, " image"]:
        """Errors without gradient, winners first; ``reference`` switches the adapter off, which is exactly the base model."""
        with torch.no_grad(), self.off(self.model) if reference else nullcontext():
            return torch.cat([self._error(images) for images in batch.pieces(split=bool(self.config.memory.split_pairs))])

    def predict(self, images: Images, *, reference: bool) -> Float[Tensor, "image channel height width"]:
        """The U-Net's answer without gradient, float32."""
        with torch.no_grad(), self.off(self.model) if reference else nullcontext():
            return self._answer(images).float()

    def backward(self, batch: PairBatch, reference: Float[Tensor, " image"], *, share: float) -> Float[Tensor, " sum"]:
        """Add ``share`` times the gradient of the pairs' summed loss to the factors; return the sums named in `SUMS`."""
        split = bool(self.config.memory.split_pairs)
        pieces = batch.pieces(split=split)
        with torch.set_grad_enabled(not split):
            answers = [self._answer(images) for images in pieces]
            policy = torch.cat([denoising_error(answer, images.target) for answer, images in zip(answers, pieces, strict=True)])
        errors = PairErrors.split(policy.detach(), reference)
        loss, gradient = weigh(errors, self.objective, weight=batch.weight, sft_weight=self.config.sft_weight)
        residuals = [answer.detach().float() - images.target for answer, images in zip(answers, pieces, strict=True)]
        scale = self._loser_scale(torch.cat(residuals))
        gradient = torch.cat([gradient.chunk(2)[0], gradient.chunk(2)[1] * scale]) * share
        if not split:
            self.accelerator.backward((policy * gradient).sum())
        else:
            del answers, residuals, policy
            for images, part in zip(pieces, gradient.chunk(2), strict=True):
                self.accelerator.backward((self._error(images) * part).sum())
        none = torch.zeros_like(loss)
        rows = (loss, (errors.advantage > 0).float(), *errors, scale.expand(len(loss)), none)
        return torch.stack([row.sum() for row in rows])

    def retain(self, images: Images, *, share: float) -> Float[Tensor, " sum"]:
        """Hold the policy to the base's own answer: add the gradient of ``share * retain_weight * sum |policy - base|^2``.

        Knowledge distillation on harmless prompts (learning without forgetting, arXiv 1606.09282). Not in AlignGuard.
        Returns: the sums named in `SUMS`; only ``loss`` and ``retention`` (unweighted) are not 0.
        """
        base = self.predict(images, reference=True)
        moved = denoising_error(self._answer(images), base)
        self.accelerator.backward(share * self.config.retain_weight * moved.sum())
        found = dict.fromkeys(SUMS, torch.zeros((), device=moved.device))
        found["retention"] = moved.detach().sum()
        found["loss"] = self.config.retain_weight * found["retention"]
        return torch.stack(list(found.values()))

    def _answer(self, images: Images) -> Float[Tensor, "image channel height width"]:
        with self.accelerator.autocast():
            return self.model.predict(images.noisy, images.timesteps, images.conditioning)

    def _error(self, images: Images) -> Float[Tensor, " image"]:
        return denoising_error(self._answer(images), images.target)

    def _loser_scale(self, residuals: Float[Tensor, "image channel height width"]) -> Float[Tensor, ""]:
        """Over the micro-batch of all processes, as one."""
        if self.config.winner_safeguard is None:
            return torch.ones((), device=residuals.device)
        winner, loser = residuals.chunk(2)
        energy, overlap = reduce_sum(self.accelerator, torch.stack([(winner * winner).sum(), (winner * loser).sum()]))
        return loser_scale(energy, overlap, mu=self.config.winner_safeguard)
