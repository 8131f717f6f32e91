"""A diffusion model as something to fine-tune: its U-Net learns to take the noise out of images, given their captions, and its text
encoders may learn with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from valign.adapters import LoraHandle
from valign.checks import UserError, check_range
from valign.data.tasks.base import TaskRow
from valign.data.tasks.captions import CaptionedImage, PairRow
from valign.data.tasks.image_folders import bucket_of
from valign.interfaces import ReadsText
from valign.models.diffusion.adapter_base import base_record
from valign.models.diffusion.base import Conditioning, DiffusionModel, LatentDist
from valign.models.diffusion.lora import CONVOLUTIONS, TEXT_ATTENTION, adaptable
from valign.models.files.adapter_files import LoraFactors
from valign.models.files.layouts import full_name
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
    """``network`` is the U-Net, or it and the text encoders by their names in `DiffusionModel.components`. The loss of an image is
    the mean squared error of its noise (or velocity), at one timestep.

    Timestep, noise and dropped caption of an image depend on the image and, while training, on torch's global seed, which the
    caller sets for each step; in evaluation mode they are always the same. So neither batches nor a resume change a draw.

    Args:
        diffusion: Its U-Net is changed by training.
        empty_prompt_prob: Share of captions replaced by the empty one while training: the other half of guidance.
        buckets: Images keep about their shape, in sizes of no more pixels than the model's own square; else all are cropped square.
            Images of different sizes stand in one batch and are denoised size by size; every image counts alike.
        text_encoder: The text encoders train, too. Every caption is encoded again in every step.
        convolutions: The U-Net's convolutions are among the modules to adapt.
    Raises: UserError for text encoders that train on a model whose networks come and go.
    """

    def __init__(
        self,
        diffusion: DiffusionModel,
        *,
        empty_prompt_prob: float = 0.1,
        buckets: bool = False,
        text_encoder: bool = False,
        convolutions: bool = False,
    ) -> None:
        check_range("DiffusionTaskModel.empty_prompt_prob", empty_prompt_prob, low=0.0, high=1.0)
        if text_encoder and diffusion.pool.mode != "resident":
            raise UserError(
                f"--text-encoder trains networks that memory.{diffusion.pool.mode} sends away, and no encoded caption can be kept. "
                "Leave one of them out."
            )
        network = diffusion.denoiser
        if text_encoder:
            network = nn.ModuleDict(dict(zip(diffusion.components, adaptable(diffusion).values(), strict=True)))
        super().__init__(network, Target("diffusion"), apart=False, fingerprint=diffusion.fingerprint(), seed=None)
        self.diffusion, self.empty_prompt_prob, self.buckets = diffusion, empty_prompt_prob, buckets
        self.text_encoder, self.convolutions = text_encoder, convolutions
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
        texts = self._texts_of(["" if draw.drop_caption else row.caption for row, draw in zip(rows, draws)])
        texts = texts.at_size(*self.size_of(rows[0]))
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

    @property
    def main(self) -> nn.Module:
        return self.diffusion.denoiser

    def attached(self, handle: Any) -> None:
        if self.text_encoder and not isinstance(handle, LoraHandle):
            raise UserError(
                "--text-encoder must go with a method that ends as plain LoRA, such as lora: no other file holds changes of two "
                "networks. Choose another --adapter, or leave it out."
            )

    def more_targets(self, targets: tuple[str, ...]) -> tuple[str, ...]:
        """With the U-Net's convolutions, and with the text encoders' attention unless ``targets`` name some of their modules."""
        found = targets
        if self.convolutions:
            modules = self.diffusion.denoiser.named_modules()
            names = {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Conv2d)}
            found += tuple(name for name in CONVOLUTIONS if name in names and name not in found)
        if self.text_encoder:
            names = {f".{name}" for encoder in self.diffusion.text_encoders for name, _ in encoder.named_modules()}
            found += () if any(name.endswith(f".{target}") for name in names for target in found) else TEXT_ATTENTION
        return found

    def adapted_modules(self, factors: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
        """Changes of `network` under the names that adapter files have, see `AdapterFile.modules`."""
        if not self.text_encoder:
            return dict(factors)
        prefixes = dict(zip(self.diffusion.components, adaptable(self.diffusion), strict=True))
        parts = {module: module.partition(".") for module in factors}
        return {full_name(prefixes[part], inner): factors[module] for module, (part, _, inner) in parts.items()}

    def checkpoint_gradients(self) -> None:
        self.diffusion.checkpoint_gradients(True)
        for encoder in self.diffusion.text_encoders if self.text_encoder else ():
            encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]

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
        more = {"buckets": self.buckets, "text_encoder": self.text_encoder, "convolutions": self.convolutions}
        return reading | {name: True for name, on in more.items() if on}  # records of a U-Net on squares have no such entries

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

    def _texts_of(self, captions: Sequence[str]) -> Conditioning:
        """Encoded once and kept, unless the text encoders train."""
        if self.text_encoder:
            return self.diffusion.encode_prompts(captions)
        return Conditioning.cat([self._caption(caption) for caption in captions])

    def _caption(self, text: str) -> Conditioning:
        if text not in self._texts:
            self._texts[text] = self.diffusion.encode_prompts([text])
        return self._texts[text]
