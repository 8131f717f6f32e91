"""What attacks through the denoiser share: an image of the goal by the published model as latents, and noise on it."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from valign.attacks.base import Scope
from valign.evaluation.suite import EvalPrompt
from valign.interfaces import SamplingConfig
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.lora import adapter_names, adapter_off
from valign.models.images import pil_to_tensor


@dataclass(frozen=True)
class NoisedGoal:
    """A noisy latent of the goal's image, its timestep, and what the denoiser should answer to it."""

    latents: Float[Tensor, "1 channel height width"]
    timestep: Int[Tensor, " 1"]
    answer: Float[Tensor, "1 channel height width"]


def goal_latents(goal: EvalPrompt, scope: Scope, steps: int) -> Float[Tensor, "1 channel height width"]:
    """Latents of an image that the published model, without adapter and guidance, gives for the goal: the attacker's own image."""
    assert scope.white is not None
    model = scope.white.model
    scope.meter.images += 1
    with adapter_off(model) if adapter_names(model) else nullcontext():
        seed = int(scope.random.integers(2**31))
        image = model.generate([goal.prompt], seeds=[seed], sampling=SamplingConfig(steps=steps))[0]
    return model.encode_images(pil_to_tensor([image], image.width)).mean


def noised(model: DiffusionModel, clean: Float[Tensor, "1 channel height width"], draw: torch.Generator) -> Iterator[NoisedGoal]:
    """Without end: fresh noise at a timestep drawn uniformly."""
    schedule = model.schedule
    while True:
        timestep = torch.randint(schedule.num_timesteps, (1,), generator=draw).to(model.device)
        noise = torch.randn(clean.shape, generator=draw).to(model.device)
        yield NoisedGoal(schedule.add_noise(clean, noise, timestep), timestep, schedule.target(clean, noise, timestep))
