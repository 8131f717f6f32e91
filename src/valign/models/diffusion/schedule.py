"""The noise schedule of Stable Diffusion 1, 2 and XL: how latents are noised, and what the denoiser answers."""

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from jaxtyping import Float, Int
from torch import Tensor

from valign.checks import UserError
from valign.models.diffusion.base import ScheduleKind

PREDICTIONS: dict[str, ScheduleKind] = {"epsilon": "epsilon", "v_prediction": "velocity"}  # diffusers' word -> ours
LEAST_UNIT = 1e-3  # floor for sqrt(alpha_bar) on schedules that end in pure noise


class DiscreteSchedule:
    """``x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise`` at the integer timesteps of a diffusers scheduler's config.

    Args:
        config: Of the pipeline's scheduler, whatever its sampler is.
        source: The model's folder, for messages.
    Raises: UserError if the denoiser predicts something else than noise or velocity.
    """

    def __init__(self, config: Any, source: str) -> None:
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise UserError(f"{source} must predict {' or '.join(PREDICTIONS)}, got {prediction!r}. Choose another model.")
        self.kind = PREDICTIONS[prediction]
        self._config = config
        self._forward = DDPMScheduler.from_config(config)

    @property
    def num_timesteps(self) -> int:
        return self._forward.config.num_train_timesteps

    def add_noise(
        self,
        latents: Float[Tensor, "batch channel height width"],
        noise: Float[Tensor, "batch channel height width"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channel height width"]:
        """``sqrt(alpha_bar_t) latents + sqrt(1 - alpha_bar_t) noise``, float32."""
        return self._forward.add_noise(latents.float(), noise.float(), timesteps)

    def target(
        self,
        latents: Float[Tensor, "batch channel height width"],
        noise: Float[Tensor, "batch channel height width"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channel height width"]:
        """What the denoiser should answer, float32: the noise, or ``sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) latents``."""
        if self.kind == "epsilon":
            return noise.float()
        return self._forward.get_velocity(latents.float(), noise.float(), timesteps)

    def alpha_bar(self, timesteps: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The share of the latents' variance that is left, as `add_noise` rounds it; float32, on the device of ``timesteps``."""
        one = torch.ones(len(timesteps), 1, 1, 1, device=timesteps.device)
        return self.add_noise(one, torch.zeros_like(one), timesteps).flatten().square()

    def noise_units(self, timesteps: Tensor) -> list[float]:
        """Factors that turn differences between the denoiser's answers into differences between noise estimates, one per timestep.

        1 for noise prediction; ``sqrt(alpha_bar_t)`` for velocity, since ``noise = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t``.
        Plain guidance does not depend on it; a guidance with thresholds (Safe Latent Diffusion) is defined on noise.
        """
        if self.kind == "epsilon":
            return [1.0] * len(timesteps)
        alphas = self._forward.alphas_cumprod[timesteps.round().long().cpu()]
        return alphas.sqrt().clamp(min=LEAST_UNIT).tolist()

    def deterministic(self, steps: int, device: torch.device) -> DDIMScheduler:
        """A sampler without noise of its own (DDIM, arXiv 2010.02502), set to ``steps`` steps: ``timesteps`` and ``step``."""
        sampler = DDIMScheduler.from_config(self._config, clip_sample=False)
        sampler.set_timesteps(steps, device=device)
        return sampler
