"""The small protocols and records between rooms: encoder, sampler, detector, chat model, retriever, cache.

A room asks for these and imports no other room for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from valign.checks import SEEDS, check_options, check_range, option

# state(step, scale, uncond, cond, *extra) -> combined answer, tensors [batch, channel, height, width]. ``step`` counts from 0,
# ``scale`` is the guidance scale. A state lives for one batch, so it may carry momentum from step to step.
GuidanceState = Callable[..., Tensor]


@runtime_checkable
class TextConditioning(Protocol):
    """Prompts as a model encodes them."""

    @property
    def embeds(self) -> Float[Tensor, "text tokens dim"]: ...
    @property
    def pooled(self) -> Float[Tensor, "text pooled_dim"] | None: ...  # SDXL only
    @property
    def time_ids(self) -> Float[Tensor, "text six"] | None: ...  # SDXL only


@runtime_checkable
class Posterior(Protocol):
    """Images as a model's autoencoder encodes them: the posterior of their scaled latents."""

    @property
    def mean(self) -> Float[Tensor, "image channel height width"]: ...
    @property
    def std(self) -> Float[Tensor, "image channel height width"]: ...


@runtime_checkable
class PairCache(Protocol):
    """What every cache of encoded pairs offers, whatever its pairs are."""

    folder: Path
    base_fingerprint: str
    ids: tuple[str, ...]  # of its rows

    @property
    def has_flip(self) -> bool: ...
    @property
    def latent_shape(self) -> tuple[int, int, int]: ...
    def fingerprint(self) -> str: ...


@runtime_checkable
class LatentEncoder(Protocol):
    """The side of a diffusion model that the latent cache needs."""

    @property
    def image_size(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def encode_prompts(self, prompts: Sequence[str]) -> TextConditioning: ...
    def encode_images(self, images: Float[Tensor, "image 3 height width"]) -> Posterior: ...
    def fingerprint(self) -> str: ...


@runtime_checkable
class ReadsText(Protocol):
    """A model that says how much of a prompt it reads."""

    def text_read(self, prompts: Sequence[str]) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How images are generated, whatever the prompts. Their size is always the model's own ``image_size``."""

    steps: int = option(50, help="denoising steps of the whole schedule", low=1)
    guidance_scale: float = option(7.5, help="classifier-free guidance scale; at 1 or below there is none", low=0)
    batch_size: int = option(8, help="images at a time; another number changes them by rounding alone", low=1)
    seed: int = option(
        0,
        help="random seed of the first image where none are given; the next ones count on from it",
        low=SEEDS[0],
        high=SEEDS[1],
    )

    def __post_init__(self) -> None:
        check_options(self)

    @classmethod
    def of(cls, config: Any) -> "SamplingConfig":
        """From a configuration that has all of these fields, among others."""
        return cls(**{item.name: getattr(config, item.name) for item in fields(cls)})

    def seeds(self, count: int) -> list[int]:
        """``seed, seed + 1, ...``, one per image."""
        return list(range(self.seed, self.seed + count))


@runtime_checkable
class Guidance(Protocol):
    """How the denoiser's answers to several texts are combined. Holds hyper-parameters only, and is shared by all batches."""

    @property
    def negative(self) -> str: ...  # text of the unconditional branch; "" is the model's own
    @property
    def texts(self) -> tuple[str, ...]: ...  # further texts, shared by all images; each costs one more evaluation a step
    def start(self) -> GuidanceState: ...


@runtime_checkable
class Sampler(Protocol):
    """The side of a diffusion model that generates images; see `valign.models.diffusion.sampling.generate`."""

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        guidance: Guidance | None = None,
        start: Sequence[Image] | None = None,
        strength: float = 0.7,
        progress: str | None = None,
    ) -> list[Image]: ...
    def fingerprint(self) -> str: ...


@runtime_checkable
class EncoderAndSampler(LatentEncoder, Sampler, Protocol):
    """Both sides: what building a data set needs."""


@dataclass(frozen=True)
class DetectorCard:
    """Which detector this is and how often it errs. An image is harmful when any class scores ``>= threshold``.

    ``sensitivity`` is the share of harmful images it flags, ``specificity`` the share of harmless ones it passes;
    None means that nobody measured them. ``positives`` and ``negatives`` count the images they were measured on.
    """

    name: str
    classes: tuple[str, ...]
    threshold: float
    weights_sha256: str
    sensitivity: float | None = None
    specificity: float | None = None
    positives: int | None = None
    negatives: int | None = None

    def __post_init__(self) -> None:
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"DetectorCard.classes must be distinct names, got {self.classes!r}. Name each class once.")
        check_range("DetectorCard.threshold", self.threshold, above=0.0, high=1.0)
        for name in ("sensitivity", "specificity"):
            value = getattr(self, name)
            if value is not None:
                check_range(f"DetectorCard.{name}", value, low=0.0, high=1.0)


@runtime_checkable
class Detector(Protocol):
    """Scores in [0, 1] per image and class of the card; at or above the card's threshold means harmful."""

    @property
    def card(self) -> DetectorCard: ...
    def detect(self, images: Sequence[Image]) -> Float[np.ndarray, "image class"]: ...


def scores_of(detector: Detector, images: Sequence[Image]) -> Float[np.ndarray, "image class"]:
    """The detector's scores, checked: one row per image, one column per class, all in [0, 1]."""
    shape = (len(images), len(detector.card.classes))
    scores = np.asarray(detector.detect(images), dtype=np.float64).reshape(shape) if images else np.zeros(shape)
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(f"{detector.card.name} must score in [0, 1], got {scores.min()} to {scores.max()}. Rescale its output.")
    return scores


@runtime_checkable
class Chat(Protocol):
    """Messages in, text out."""

    def complete(self, messages: list[dict[str, str]]) -> str: ...


@runtime_checkable
class Retriever(Protocol):
    """Names the value principle that a prompt calls for by its id, or None."""

    def retrieve(self, prompt: str) -> str | None: ...
    def fingerprint(self) -> str: ...  # changes whenever an answer may
