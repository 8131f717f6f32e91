"""A diffusion model's U-Net as something to fine-tune: it learns to take the noise out of images, given their captions."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import check_range
from valign.data.tasks.base import TaskRow
from valign.data.tasks.captions import CaptionedImage
from valign.models.diffusion.base import Conditioning, DiffusionModel, LatentDist
from valign.models.heads.task_model import Target, TaskBatch, TaskModel
from valign.randomness import generator_for
from valign.training.engine.draws import PairDraw, draw_pair


def predicted(diffusion: DiffusionModel, batch: TaskBatch) -> Float[Tensor, "row channel height width"]:
    """The model's answer to a batch of `DiffusionTaskModel.noised`."""
    texts = {field.name: batch.inputs.get(field.name) for field in fields(Conditioning)}
    return diffusion.predict(batch.inputs["noisy"], batch.inputs["timesteps"], Conditioning(**texts))  # type: ignore[arg-type]


class DiffusionTaskModel(TaskModel):
    """``network`` is the U-Net. The loss of an image is the mean squared error of its noise (or velocity), at one timestep.

    Timestep, noise and dropped caption of an image depend on the image and, while training, on torch's global seed, which the
    caller sets for each step; in evaluation mode they are always the same. So neither batches nor a resume change a draw.

    Args:
        diffusion: Its U-Net is changed by training.
        empty_prompt_prob: Share of captions replaced by the empty one while training: the other half of guidance.
    """

    def __init__(self, diffusion: DiffusionModel, *, empty_prompt_prob: float = 0.1) -> None:
        check_range("DiffusionTaskModel.empty_prompt_prob", empty_prompt_prob, low=0.0, high=1.0)
        super().__init__(diffusion.denoiser, Target("diffusion"), apart=False, fingerprint=diffusion.fingerprint(), seed=None)
        self.diffusion, self.empty_prompt_prob = diffusion, empty_prompt_prob
        self._latents: dict[str, LatentDist] = {}  # by the image's digest; read and encoded when first met
        self._texts: dict[str, Conditioning] = {}

    def batch(self, rows: Sequence[Any]) -> TaskBatch:
        return self.noised(rows, [self.draw_of(row) for row in rows])

    def noised(self, rows: Sequence[CaptionedImage], draws: Sequence[PairDraw]) -> TaskBatch:
        """Noisy images as input of the denoiser: each with its draw's timestep, noise and caption (or the empty one)."""
        known = [self._image(row) for row in rows]
        noise, posterior = (torch.stack(each).to(self.device) for each in zip(*((d.noise, d.winner_noise) for d in draws)))
        latents = torch.cat([dist.mean for dist in known]) + torch.cat([dist.std for dist in known]) * posterior
        timesteps = torch.tensor([draw.timestep for draw in draws], device=self.device)
        texts = Conditioning.cat([self._caption("" if draw.drop_caption else row.caption) for row, draw in zip(rows, draws)])
        inputs = {
            "noisy": self.diffusion.schedule.add_noise(latents, noise, timesteps),
            "timesteps": timesteps,
            **{name: value for name, value in vars(texts).items() if value is not None},
        }
        return TaskBatch(inputs, self.diffusion.schedule.target(latents, noise, timesteps), len(rows))

    def forward(self, batch: TaskBatch) -> Float[Tensor, "row channel height width"]:
        return predicted(self.diffusion, batch)

    def summed(self, answer: Tensor, batch: TaskBatch) -> Float[Tensor, ""]:
        return (answer - batch.target).square().mean((1, 2, 3)).sum()

    def vectors(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "input width"]:
        raise TypeError("A U-Net gives images, not one vector per input.")

    def reading(self) -> dict[str, Any]:
        return {"side": self.diffusion.image_size, "empty_prompt_prob": self.empty_prompt_prob}

    def provenance(self) -> dict[str, str]:
        """For the adapter's record."""
        return {"base": self.diffusion.folder, "base_fingerprint": self.fingerprint, "family": self.diffusion.family}

    def draw_of(self, row: TaskRow) -> PairDraw:
        """A pair's draw, of which a single image is the winner."""
        key = ("training", torch.initial_seed()) if self.training else ("judged",)
        return draw_pair(
            generator_for("picture", *key, row.content),
            self.diffusion.latent_shape,
            num_timesteps=self.diffusion.schedule.num_timesteps,
            empty_prompt_prob=self.empty_prompt_prob if self.training else 0.0,
        )

    def _image(self, row: CaptionedImage) -> LatentDist:
        """One by one: what an image's latents are must not depend on its neighbours."""
        if row.digest not in self._latents:
            self._latents[row.digest] = self.diffusion.encode_images(row.pixels(self.diffusion.image_size)[None])
        return self._latents[row.digest]

    def _caption(self, text: str) -> Conditioning:
        if text not in self._texts:
            self._texts[text] = self.diffusion.encode_prompts([text])
        return self._texts[text]
