"""A diffusion model's U-Net as something to fine-tune: it learns to take the noise out of images, given their captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import check_range
from valign.data.tasks.base import TaskRow
from valign.data.tasks.captions import CaptionedImage, PairRow
from valign.data.tasks.image_folders import bucket_of
from valign.interfaces import ReadsText
from valign.models.diffusion.adapter_base import base_record
from valign.models.diffusion.base import Conditioning, DiffusionModel, LatentDist
from valign.models.heads.task_model import Target, TaskBatch, TaskModel
from valign.randomness import generator_for
from valign.training.engine.draws import PairDraw, draw_pair


def predicted(diffusion: DiffusionModel, batch: TaskBatch) -> Float[Tensor, "row channel height width"]:
    """The model's answer to a batch of `DiffusionTaskModel.noised`."""
    texts = {field.name: batch.inputs.get(field.name) for field in fields(Conditioning)}
    return diffusion.predict(batch.inputs["noisy"], batch.inputs["timesteps"], Conditioning(**texts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class MixedBatch(TaskBatch):
    """Batches of images of one size each, as one; ``target`` is theirs one after the other, flat."""

    parts: tuple[TaskBatch, ...]

    @classmethod
    def of(cls, parts: Sequence[TaskBatch]) -> "MixedBatch":
        target = torch.cat([part.target.flatten() for part in parts])
        return cls({}, target, sum(part.weight for part in parts), tuple(parts))


class DiffusionTaskModel(TaskModel):
    """``network`` is the U-Net. The loss of an image is the mean squared error of its noise (or velocity), at one timestep.

    Timestep, noise and dropped caption of an image depend on the image and, while training, on torch's global seed, which the
    caller sets for each step; in evaluation mode they are always the same. So neither batches nor a resume change a draw.

    Args:
        diffusion: Its U-Net is changed by training.
        empty_prompt_prob: Share of captions replaced by the empty one while training: the other half of guidance.
        buckets: Images keep about their shape, in sizes of no more pixels than the model's own square; else all are cropped square.
            Images of different sizes stand in one batch and are denoised size by size; every image counts alike.
    """

    def __init__(self, diffusion: DiffusionModel, *, empty_prompt_prob: float = 0.1, buckets: bool = False) -> None:
        check_range("DiffusionTaskModel.empty_prompt_prob", empty_prompt_prob, low=0.0, high=1.0)
        super().__init__(diffusion.denoiser, Target("diffusion"), apart=False, fingerprint=diffusion.fingerprint(), seed=None)
        self.diffusion, self.empty_prompt_prob, self.buckets = diffusion, empty_prompt_prob, buckets
        self._latents: dict[str, LatentDist] = {}  # by the image's digest; read and encoded when first met
        self._texts: dict[str, Conditioning] = {}

    def batch(self, rows: Sequence[Any]) -> TaskBatch:
        by_size: dict[tuple[int, int], list[Any]] = {}
        for row in rows:
            by_size.setdefault(self.size_of(row), []).append(row)
        parts = [self.noised(same, [self.draw_of(row) for row in same]) for same in by_size.values()]
        return parts[0] if len(parts) == 1 else MixedBatch.of(parts)

    def size_of(self, row: TaskRow) -> tuple[int, int]:
        """Width and height at which an image is read, pixels."""
        side, extent = self.diffusion.image_size, getattr(row, "extent", None)
        if not self.buckets or extent is None:
            return side, side
        pixel = side // self.diffusion.latent_shape[-1]  # image pixels a side per latent one
        return bucket_of(*extent, side=side, step=pixel * max(1, min(8, side // 8 // pixel)))

    def noised(self, rows: Sequence[CaptionedImage], draws: Sequence[PairDraw]) -> TaskBatch:
        """Noisy images as input of the denoiser: each with its draw's timestep, noise and caption (or the empty one)."""
        known = [self._image(row) for row in rows]
        noise, posterior = (torch.stack(each).to(self.device) for each in zip(*((d.noise, d.winner_noise) for d in draws)))
        latents = torch.cat([dist.mean for dist in known]) + torch.cat([dist.std for dist in known]) * posterior
        timesteps = torch.tensor([draw.timestep for draw in draws], device=self.device)
        captions = [self._caption("" if draw.drop_caption else row.caption) for row, draw in zip(rows, draws)]
        texts = Conditioning.cat(captions).at_size(*self.size_of(rows[0]))
        inputs = {
            "noisy": self.diffusion.schedule.add_noise(latents, noise, timesteps),
            "timesteps": timesteps,
            **{name: value for name, value in vars(texts).items() if value is not None},
        }
        return TaskBatch(inputs, self.diffusion.schedule.target(latents, noise, timesteps), len(rows))

    def prepare(self, rows: Sequence[Any]) -> None:
        """Where networks come and go: all captions, then all images are encoded first, then the denoiser alone is needed."""
        if self.diffusion.pool.mode == "resident":
            return
        for text in dict.fromkeys(["", *(row.caption for row in rows)]):
            self._caption(text)
        for row in rows:
            self._image(row)
        self.diffusion.pool.need("denoiser")

    def cut(self, rows: Sequence[CaptionedImage | PairRow]) -> int:
        """How many captions are longer than the text encoder reads; 0 where the model does not say."""
        if not isinstance(self.diffusion, ReadsText):
            return 0
        captions = [row.caption for row in rows]
        return sum(read != caption for read, caption in zip(self.diffusion.text_read(captions), captions, strict=True))

    def forward(self, batch: TaskBatch) -> Float[Tensor, "..."]:
        """``[row, channel, height, width]``; of images of several sizes one after the other, flat."""
        if isinstance(batch, MixedBatch):
            return torch.cat([self.forward(part).flatten() for part in batch.parts])
        return predicted(self.diffusion, batch)

    def summed(self, answer: Tensor, batch: TaskBatch) -> Float[Tensor, ""]:
        if isinstance(batch, MixedBatch):
            pieces = answer.split([part.target.numel() for part in batch.parts])
            parts = zip(pieces, batch.parts, strict=True)
            return torch.stack([self.summed(piece.view_as(part.target), part) for piece, part in parts]).sum()
        return (answer - batch.target).square().mean((1, 2, 3)).sum()

    def vectors(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "input width"]:
        raise TypeError("A U-Net gives images, not one vector per input.")

    def reading(self) -> dict[str, Any]:
        reading = {"side": self.diffusion.image_size, "empty_prompt_prob": self.empty_prompt_prob}
        return reading | ({"buckets": True} if self.buckets else {})  # records of squares have no such entry

    def provenance(self) -> dict[str, str]:
        """For the adapter's record."""
        return base_record(self.diffusion)

    def draw_of(self, row: TaskRow) -> PairDraw:
        """A pair's draw, of which a single image is the winner."""
        key = ("training", torch.initial_seed()) if self.training else ("judged",)
        return draw_pair(
            generator_for("picture", *key, row.content),
            self._latent_shape(row),
            num_timesteps=self.diffusion.schedule.num_timesteps,
            empty_prompt_prob=self.empty_prompt_prob if self.training else 0.0,
        )

    def _latent_shape(self, row: TaskRow) -> tuple[int, int, int]:
        channels, height, width = self.diffusion.latent_shape
        side, (wide, high) = self.diffusion.image_size, self.size_of(row)
        return channels, height * high // side, width * wide // side

    def _image(self, row: CaptionedImage) -> LatentDist:
        """One by one: what an image's latents are must not depend on its neighbours."""
        if row.digest not in self._latents:
            wide, high = self.size_of(row)
            pixels = row.pixels(wide) if wide == high else row.pixels_in(wide, high)
            self._latents[row.digest] = self.diffusion.encode_images(pixels[None])
        return self._latents[row.digest]

    def _caption(self, text: str) -> Conditioning:
        if text not in self._texts:
            self._texts[text] = self.diffusion.encode_prompts([text])
        return self._texts[text]
