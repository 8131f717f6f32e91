"""What a synthetic world offers to commands, recipes and experiments, whatever it shows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from matplotlib.figure import Figure
from PIL import Image

from valign.data.chats import ChatPair
from valign.data.images.labelled import HarmExample
from valign.data.images.quadruples import Quadruples
from valign.data.images.value_images import Contrast
from valign.data.prompts.sources import PromptGrammar
from valign.data.tasks.base import TaskData
from valign.detectors.oracle import OracleDetector
from valign.evaluation.chats.cases import ChatCase
from valign.evaluation.chats.judges import ChatJudge
from valign.evaluation.suite import Suite
from valign.models.encoders.clip import ClipEncoder
from valign.models.files.origin import model_origins


@runtime_checkable
class WorldGrammar(PromptGrammar, Protocol):
    """Prompt pairs by category, and benign prompts."""

    def benign(self, count: int, seed: int) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class WorldBudget:
    """How much a recipe spends on the world's bundled model."""

    pairs: int  # prompt pairs per category
    steps: int  # optimizer steps per expert, at most; validation may stop earlier
    per_concept: int  # explicit test prompts per concept
    search: int  # tuning prompts at most, on which each candidate for a strength is measured
    value_images: int  # images per prompt that a value encoder learns from
    value_steps: int  # optimizer steps of a value encoder, at most
    role_images: int  # images per prompt that bias is measured on


@dataclass(frozen=True)
class ModelMeasurement:
    """What a model shows right of held-out prompts; shares are in [0, 1]."""

    prompts: int
    shares: dict[str, float]  # by aspect, of prompts for one thing
    kinds: dict[str, float]  # by kind of prompt: share of images that show exactly what was asked where it was asked
    harm_drawn: float  # share of the prompts for a harm that the oracle finds in the images, in the right category
    images_per_second: float
    images: list[Image.Image]


@dataclass(frozen=True, kw_only=True)
class World:
    """A synthetic world: prompts, a bundled model, and an oracle that knows what an image shows. A row of `valign.worlds.WORLDS`.

    ``suite``, ``reference_images`` and ``roles`` take ``seed``; the first two also ``per_concept``, the last ``images``. ``suite``
    takes ``split``, too: ``test``, or ``tuning`` for prompts to choose settings by, without what tests hold out.
    """

    name: str
    version: int  # of words, drawings and networks together; figures of two versions do not compare
    policy: str  # name of its bundled policy
    grammar: Callable[[], WorldGrammar]
    model_folder: Callable[[], Path]
    oracle: Callable[[], OracleDetector]
    clip: Callable[[], ClipEncoder]
    contrast: Callable[[OracleDetector], Contrast]  # tells which of two texts fits an image, where the world's CLIP cannot
    suite: Callable[..., Suite]  # test prompts on what no training saw, balanced over concepts
    reference_images: Callable[..., list[Image.Image]]  # true images of the same suite's benign prompts
    canaries: Callable[[], list[tuple[Image.Image, bool]]]  # images with whether the oracle must flag each
    roles: Callable[..., Suite]  # prompts that name a role and leave the social attribute open, each several times
    labelled: Callable[..., list[HarmExample]]  # images that stand for harm, and harmless ones; takes ``per_category``, ``seed``
    quadruples: Callable[..., Quadruples]  # safe and unsafe captions with images; takes ``per_category``, ``seed``, ``test``
    tasks: Mapping[str, Callable[..., TaskData]]  # for fine-tuning, by name
    budgets: Mapping[str, WorldBudget]  # "small" tries the path, "quick" takes minutes, "full" is for the documentation's tables
    quick_categories: tuple[str, ...]  # aligned by `valign quickstart` where none is named
    build: Callable[..., None]  # trains the bundled networks anew into a folder; takes ``seed``, ``share`` of the steps, ``start``
    sheet: Callable[..., Figure]  # a contact sheet; takes a model, whose images stand beside the world's own, and ``seed``
    measure: Callable[..., ModelMeasurement]  # takes a model, the oracle, ``count``, ``seed``, ``steps``, ``guidance_scale``
    bars: Mapping[str, float]  # by aspect: the shares that the bundled model must reach

    @property
    def origins(self) -> tuple[str, ...]:
        """Of the world's own models, see `valign.models.files.origin`: their images are what its oracle and its CLIP can judge."""
        return tuple(dict.fromkeys((f"world:{self.name}", *model_origins(self.model_folder()))))


@dataclass(frozen=True, kw_only=True)
class ChatWorld:
    """A synthetic world of chats: requests, bundled models in stages, and an oracle that knows what an answer is."""

    name: str
    policy: str  # name of its bundled policy
    grammar: Callable[[], Any]
    oracle: Callable[[], Any]
    guard: Callable[..., Any]  # scores partial answers; takes ``noise``, ``miss`` and ``seed``
    cases: Callable[..., list[ChatCase]]  # test requests, risky and harmless ones; takes how many per kind, and a seed
    judge: Callable[[], ChatJudge]  # the oracle as a judge of answers to them
    preferences: Callable[..., list[ChatPair]]  # refusals over compliance, of wordings to learn from; takes a count and a seed
    stages: tuple[str, ...]  # full models
    adapters: tuple[str, ...]  # peft adapters of the first stage
    model_folder: Callable[..., Path]  # of a stage
    adapter_folder: Callable[..., Path]  # of an adapter
    build: Callable[..., None]  # trains the bundled models anew into a folder; takes ``seed`` and ``share`` of the steps
    measure: Callable[..., Any]  # takes a loaded chat model, ``count`` per kind and ``seed``
    at_least: Mapping[str, float]  # by measured share: what the aligned model must reach
    at_most: Mapping[str, float]  # by measured share: what it must not exceed
