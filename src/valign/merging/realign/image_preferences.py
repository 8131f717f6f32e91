"""Safety preferences of a diffusion model: under an unsafe caption its safe image is preferred, scored by denoising errors."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from valign.checks import UserError, check_range
from valign.data.images.quadruples import Quadruples
from valign.models.diffusion.base import DiffusionModel
from valign.models.images import pil_to_tensor
from valign.objectives.preference.pair_errors import denoising_error
from valign.randomness import generator_for
from valign.training.engine.draws import draw_pair

BATCH = 16  # images that the autoencoder reads at a time


class ImagePreferences:
    """Latents and captions of quadruples, and the model at the fine-tunings' start; a `SafetyPreferences`.

    Args:
        model: In float32; its weights are never changed.
        rows: With images.
        scale: A log-likelihood is ``-scale / 2`` times the mean squared denoising error, so that SOMF's beta of 0.1 is that of
            Diffusion-DPO, 5000 (arXiv 2311.12908, equation 14).
        seed: Of noise and timesteps, which both images of a pair share.
    Raises: UserError for rows without images.
    """

    def __init__(self, model: DiffusionModel, rows: Quadruples, *, scale: float = 50_000.0, seed: int = 0) -> None:
        check_range("ImagePreferences.scale", scale, above=0)
        if not rows.has_images:
            raise UserError(f"{rows.origin} must have a safe and an unsafe image in every row, got captions alone. Add the images.")
        self.model, self.rows, self.scale, self.seed = model, rows, scale, seed
        self.network: nn.Module = model.denoiser.eval()
        self.latents = {side: self._encoded(side) for side in ("safe", "unsafe")}
        self.captions = model.encode_prompts([row.unsafe for row in rows.rows])

    def _encoded(self, side: str) -> Float[Tensor, "pair channel height width"]:
        """Mean latents of one side's images."""
        found, rows = [], self.rows.rows
        for first in range(0, len(rows), BATCH):
            images = [row.image(side) for row in rows[first : first + BATCH]]
            found.append(self.model.encode_images(pil_to_tensor(images, self.model.image_size)).mean)
        return torch.cat(found)

    def __len__(self) -> int:
        return len(self.rows.rows)

    def fingerprint(self) -> str:
        return self.rows.fingerprint

    def score(self, places: Sequence[int], weights: Mapping[str, Tensor], draw: int) -> Float[Tensor, "pair 2"]:
        """Of the safe and of the unsafe image under the unsafe caption, at one noise and timestep that ``draw`` decides."""
        model, rows = self.model, list(places)
        latents = torch.cat([self.latents[side][rows] for side in ("safe", "unsafe")])
        made = [
            draw_pair(
                generator_for("image preferences", self.seed, draw, place),
                model.latent_shape,
                num_timesteps=model.schedule.num_timesteps,
            )
            for place in rows
        ]
        noise = torch.stack([one.noise for one in made]).to(latents).repeat(2, 1, 1, 1)
        times = torch.tensor([one.timestep for one in made], device=latents.device).repeat(2)
        noisy, target = model.schedule.add_noise(latents, noise, times), model.schedule.target(latents, noise, times)
        with _under(model, weights):
            answer = model.predict(noisy, times, self.captions.select(rows).repeat(2))
        return torch.stack((-self.scale / 2 * denoising_error(answer, target)).chunk(2), dim=1)


@contextmanager
def _under(model: DiffusionModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The denoiser answers with these weights in the place of its own."""
    plain = model.denoiser
    model.denoiser = _Substituted(plain, weights)
    try:
        yield
    finally:
        model.denoiser = plain


class _Substituted(nn.Module):
    def __init__(self, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network, self.weights = network, dict(weights)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.network, self.weights, args, kwargs)
