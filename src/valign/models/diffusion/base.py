"""What every text-to-image model offers, whatever its architecture: `DiffusionModel`, its `NoiseSchedule` and their records."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor, nn

from valign.interfaces import EncoderAndSampler
from valign.models.diffusion.network_pool import NetworkPool

ScheduleKind = Literal["epsilon", "velocity", "flow"]  # what a denoiser predicts


@dataclass(frozen=True)
class Conditioning:
    """Encoded text, one row per prompt. ``pooled`` and ``time_ids`` are there for SDXL only."""

    embeds: Float[Tensor, "batch tokens dim"]
    pooled: Float[Tensor, "batch pooled"] | None = None
    time_ids: Float[Tensor, "batch six"] | None = None  # original height, width, crop top, left, target height, width; pixels

    def __len__(self) -> int:
        return len(self.embeds)

    def select(self, rows: Tensor | slice | list[int]) -> "Conditioning":
        """The given rows, in that order; a row may be asked for twice."""
        return self._map(lambda tensor: tensor[rows])

    def repeat(self, n: int) -> "Conditioning":
        """The whole batch ``n`` times: rows a b -> a b a b."""
        return self._map(lambda tensor: tensor.repeat(n, *(1,) * (tensor.ndim - 1)))

    def at_size(self, width: int, height: int) -> "Conditioning":
        """For images of this size, pixels: SDXL is told it as both original and target size."""
        if self.time_ids is None:
            return self
        told = self.time_ids.new_tensor([height, width, 0, 0, height, width])
        return Conditioning(self.embeds, self.pooled, told.expand(len(self), -1))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Conditioning":
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """All rows of ``parts``, in order. The parts must come from one model."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        time_ids = [part.time_ids for part in parts if part.time_ids is not None]
        return Conditioning(
            torch.cat([part.embeds for part in parts]),
            torch.cat(pooled) if pooled else None,
            torch.cat(time_ids) if time_ids else None,
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        return Conditioning(
            change(self.embeds),
            None if self.pooled is None else change(self.pooled),
            None if self.time_ids is None else change(self.time_ids),
        )


@dataclass(frozen=True)
class LatentDist:
    """Posterior of an image's latents, already in the units of the denoiser: ``(latent - shift) * scaling_factor``, float32."""

    mean: Float[Tensor, "batch channel height width"]
    std: Float[Tensor, "batch channel height width"]

    def sample(self, noise: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch channel height width"]:
        """``mean + std * noise`` for standard normal ``noise``."""
        return self.mean + self.std * noise


@runtime_checkable
class NoiseSchedule(Protocol):
    """How a model's latents are noised, and what its denoiser answers."""

    @property
    def kind(self) -> ScheduleKind: ...
    @property
    def num_timesteps(self) -> int: ...

    def add_noise(
        self,
        latents: Float[Tensor, "batch channel height width"],
        noise: Float[Tensor, "batch channel height width"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channel height width"]: ...

    def target(
        self,
        latents: Float[Tensor, "batch channel height width"],
        noise: Float[Tensor, "batch channel height width"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channel height width"]: ...

    def alpha_bar(self, timesteps: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]: ...
    def noise_units(self, timesteps: Tensor) -> list[float]: ...
    def deterministic(self, steps: int, device: torch.device) -> Any: ...  # a diffusers scheduler without noise of its own


@runtime_checkable
class DiffusionModel(EncoderAndSampler, Protocol):
    """A text-to-image diffusion model that can be trained on and sampled from. `load_model` makes one."""

    family: str  # "stable-diffusion" or "sdxl"
    folder: str  # where the weights came from
    pipe: Any  # the diffusers pipeline that holds the parts; read in this room only

    @property
    def denoiser(self) -> nn.Module: ...
    @denoiser.setter
    def denoiser(self, network: nn.Module) -> None: ...
    @property
    def schedule(self) -> NoiseSchedule: ...
    @property
    def components(self) -> Mapping[str, str]: ...  # part that adapters may change -> prefix of its keys in adapter files
    @property
    def pool(self) -> NetworkPool: ...  # where its networks are
    @property
    def encoders(self) -> list[nn.Module]: ...  # of images and texts; a training from cached latents does not need them
    @property
    def text_encoders(self) -> list[nn.Module]: ...
    @property
    def tokenizers(self) -> list[Any]: ...  # one per text encoder
    @property
    def text_width(self) -> int: ...  # of the states that the denoiser's cross-attention reads
    @property
    def device(self) -> torch.device: ...
    @property
    def latent_shape(self) -> tuple[int, int, int]: ...  # channel, height, width

    def to(self, device: torch.device | str) -> None: ...
    def checkpoint_gradients(self, on: bool) -> None: ...
    def encode_prompts(self, prompts: Sequence[str], *, length: int | None = None) -> Conditioning: ...
    def encode_images(self, images: Float[Tensor, "batch 3 height width"]) -> LatentDist: ...
    def decode_latents(self, latents: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch 3 rows columns"]: ...

    def predict(
        self, noisy: Float[Tensor, "batch channel height width"], timesteps: Real[Tensor, "..."], conditioning: Conditioning
    ) -> Float[Tensor, "batch channel height width"]: ...
