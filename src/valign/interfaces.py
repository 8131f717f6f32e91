"""The small protocols between rooms: encoder, sampler, detector, chat model, retriever, cache. A room asks for these and imports no
other room for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor


@runtime_checkable
class TextConditioning(Protocol):
    """What a model makes of prompts."""

    @property
    def embeds(self) -> Float[Tensor, "text tokens dim"]: ...
    @property
    def pooled(self) -> Float[Tensor, "text pooled_dim"] | None: ...  # SDXL only
    @property
    def time_ids(self) -> Float[Tensor, "text six"] | None: ...  # SDXL only


@runtime_checkable
class Posterior(Protocol):
    """What a model's autoencoder makes of images: scaled latents."""

    @property
    def mean(self) -> Float[Tensor, "image channel height width"]: ...
    @property
    def std(self) -> Float[Tensor, "image channel height width"]: ...


@runtime_checkable
class PairCache(Protocol):
    """What every cache of encoded pairs has, however its pairs come about."""

    folder: Path
    base_fingerprint: str
    ids: tuple[str, ...]  # of its rows

    @property
    def has_flip(self) -> bool: ...
    @property
    def latent_shape(self) -> tuple[int, int, int]: ...
    def fingerprint(self) -> str: ...


@runtime_checkable
class Encoder(Protocol):
    """The side of a diffusion model that the latent cache needs."""

    @property
    def image_size(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def encode_prompts(self, prompts: Sequence[str]) -> TextConditioning: ...
    def encode_images(self, images: Float[Tensor, "image 3 height width"]) -> Posterior: ...
    def fingerprint(self) -> str: ...


@runtime_checkable
class Sampler(Protocol):
    """The side of a diffusion model that makes images."""

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int = 50,
        guidance_scale: float = 7.5,
        batch_size: int = 8,
        start: list[Image] | None = None,
        strength: float = 0.7,
    ) -> list[Image]: ...
    def fingerprint(self) -> str: ...


@runtime_checkable
class Model(Encoder, Sampler, Protocol):
    """Both sides."""


@runtime_checkable
class Card(Protocol):
    """What a detector says of itself."""

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def threshold(self) -> float: ...
    @property
    def weights_sha256(self) -> str: ...


@runtime_checkable
class Detector(Protocol):
    """Scores in [0, 1] per image and class; at or above the card's threshold means harmful."""

    @property
    def card(self) -> Card: ...
    def detect(self, images: Sequence[Image]) -> Float[np.ndarray, "image class"]: ...


@runtime_checkable
class Chat(Protocol):
    """Messages in, text out."""

    def complete(self, messages: list[dict[str, str]]) -> str: ...


@runtime_checkable
class Retriever(Protocol):
    """Names the value principle that a prompt calls for by its id, or None."""

    def retrieve(self, prompt: str) -> str | None: ...
    def fingerprint(self) -> str: ...  # changes whenever an answer may
