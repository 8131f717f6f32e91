"""The small protocols and records between rooms: encoder, sampler, detector, chat model, retriever, cache.

A room asks for these and imports no other room for them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

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
class Animator(Protocol):
    """A model that makes short animations of prompts, each a list of frames; see `valign.models.diffusion.animation.animate`."""

    def animate(
        self,
        prompts: Sequence[str],
        *,
        frames: int,
        seeds: Sequence[int] | None = None,
        sampling: SamplingConfig = SamplingConfig(),
    ) -> list[list[Image]]: ...
    def fingerprint(self) -> str: ...


@runtime_checkable
class EncoderAndSampler(LatentEncoder, Sampler, Protocol):
    """Both sides: what building a data set needs."""


EVERY_CATEGORY = "all"  # in `DetectorCard.covers`: the class measures harm of every category


@dataclass(frozen=True)
class DetectorCard:
    """Which detector this is, what it can judge, and how often it errs. An image is harmful when any class scores ``>= threshold``.

    ``sensitivity`` is the share of harmful images it flags, ``specificity`` the share of harmless ones it passes;
    None means that nobody measured them. ``positives`` and ``negatives`` count the images they were measured on.

    ``covers`` says which categories of harm are measured: class -> a category's id, several, or ``"all"``; a class that it does
    not name measures none, and ``"all"`` alone stands for every class. None: each class measures the category of its own name.
    It is kept as class -> tuple of ids, one entry per class. Harm of another category is not measured, which is not the same
    as harmless.

    ``domain`` says whose images it can judge: origins of models as `valign.models.files.origin.model_origins` gives them, such as
    ``world:shapes``; one of a model's own has to be among them. Empty: any image.

    ``by_category``: category -> (flagged, positives), of how many of its harmful images any class fired; empty if nobody counted.

    ``abstains``: its scores may be NaN, where it came to no answer about an image. Such an image counts as harmful wherever
    images are let through, and as not measured wherever rates are computed.

    ``asdict`` gives its JSON form, and `from_json` the card again.
    """

    name: str
    classes: tuple[str, ...]
    threshold: float
    weights_sha256: str
    sensitivity: float | None = None
    specificity: float | None = None
    positives: int | None = None
    negatives: int | None = None
    covers: Mapping[str, str | Sequence[str]] | str | None = None
    domain: tuple[str, ...] = ()
    abstains: bool = False
    by_category: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"DetectorCard.classes must be distinct names, got {self.classes!r}. Name each class once.")
        check_range("DetectorCard.threshold", self.threshold, above=0.0, high=1.0)
        for name in ("sensitivity", "specificity"):
            value = getattr(self, name)
            if value is not None:
                check_range(f"DetectorCard.{name}", value, low=0.0, high=1.0)
        object.__setattr__(self, "covers", self._coverage())
        counts = {category: tuple(pair) for category, pair in self.by_category.items()}
        for category, pair in counts.items():
            if len(pair) != 2 or not 0 <= pair[0] <= pair[1] or not pair[1]:
                raise ValueError(f"DetectorCard.by_category must hold (flagged, positives), got {pair} for {category}.")
        object.__setattr__(self, "by_category", counts)
        for origin in self.domain:
            if not all(origin.partition(":")):
                raise ValueError(f"DetectorCard.domain must hold origins such as world:shapes, got {origin!r}.")

    def _coverage(self) -> dict[str, tuple[str, ...]]:
        """``covers`` as class -> ids, one entry per class."""
        given = {one: one for one in self.classes} if self.covers is None else self.covers
        if isinstance(given, str):
            if given != EVERY_CATEGORY:
                raise ValueError(f'DetectorCard.covers must be class -> categories, or "{EVERY_CATEGORY}", got {given!r}.')
            given = dict.fromkeys(self.classes, EVERY_CATEGORY)
        if unknown := sorted(set(given) - set(self.classes)):
            raise ValueError(
                f"DetectorCard.covers must name classes of the detector, got {unknown[0]!r}. It has {', '.join(self.classes)}."
            )
        listed = {one: given.get(one, ()) for one in self.classes}
        found = {one: (ids,) if isinstance(ids, str) else tuple(ids) for one, ids in listed.items()}
        if any(not category for ids in found.values() for category in ids):
            raise ValueError("DetectorCard.covers must hold ids of categories, got an empty one. Leave the class out instead.")
        return found

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "DetectorCard":
        """The card whose ``asdict`` was written as JSON, where lists stand for tuples."""
        return cls(**{**record, **{name: tuple(record.get(name, ())) for name in ("classes", "domain")}})

    @property
    def coverage(self) -> Mapping[str, tuple[str, ...]]:
        """``covers`` as it is kept: class -> ids of categories."""
        return cast(Mapping[str, tuple[str, ...]], self.covers)

    def classes_for(self, category: str) -> tuple[str, ...]:
        """The classes that measure harm of this category; none where it is not measured."""
        return tuple(one for one, ids in self.coverage.items() if category in ids or EVERY_CATEGORY in ids)

    def measures(self, category: str) -> bool:
        """Whether harm of this category is measured."""
        return bool(self.classes_for(category))

    def within(self, category: str) -> "DetectorCard":
        """The card with the sensitivity to images of one category; that over all harm where nobody counted by category."""
        if not self.by_category:
            return self
        flagged, positives = self.by_category.get(category, (0, 0))
        return replace(self, sensitivity=flagged / positives if positives else None, positives=positives or None)

    def better_than_chance(self) -> bool | None:
        """Whether it flags harmful images more often than harmless ones; None where nobody measured it."""
        if self.sensitivity is None or self.specificity is None:
            return None
        return self.sensitivity + self.specificity > 1


@runtime_checkable
class Detector(Protocol):
    """Scores in [0, 1] per image and class of the card; at or above the card's threshold means harmful."""

    @property
    def card(self) -> DetectorCard: ...
    def detect(self, images: Sequence[Image]) -> Float[np.ndarray, "image class"]: ...


@runtime_checkable
class KeepsAnswers(Protocol):
    """A detector whose answers are costly, and do not repeat exactly: a model behind an endpoint."""

    def keep_answers(self, folder: Path) -> None: ...  # write them to ``folder`` as they come, and take those that are there
    def remarks(self) -> list[str]: ...  # what a reader of its verdicts must know, in sentences


def scores_of(detector: Detector, images: Sequence[Image]) -> Float[np.ndarray, "image class"]:
    """The scores, checked: a row per image, a column per class, all in [0, 1], or NaN where the card says that it abstains."""
    shape = (len(images), len(detector.card.classes))
    scores = np.asarray(detector.detect(images), dtype=np.float64).reshape(shape) if images else np.zeros(shape)
    known = scores[~np.isnan(scores)] if detector.card.abstains else scores
    if not ((known >= 0) & (known <= 1)).all():
        raise ValueError(f"{detector.card.name} must score in [0, 1], got {known.min()} to {known.max()}. Rescale its output.")
    return scores


@runtime_checkable
class Chat(Protocol):
    """Messages in, text out."""

    def complete(self, messages: list[dict[str, Any]]) -> str: ...


@runtime_checkable
class Retriever(Protocol):
    """Names the value principle that a prompt calls for by its id, or None."""

    def retrieve(self, prompt: str) -> str | None: ...
    def fingerprint(self) -> str: ...  # changes whenever an answer may
