"""What is compared: a base model, the same with an adapter, or under a guidance. Whatever turns prompts into images will do."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from valign.checks import UserError
from valign.evaluation.suite import FILE_NAME
from valign.interfaces import Guidance, SamplingConfig
from valign.models.files.origin import model_origins

if TYPE_CHECKING:
    from valign.models.diffusion.base import DiffusionModel
    from valign.models.diffusion.value_pipeline import ValueGuidedPipeline

Generate = Callable[[list[str], list[int]], list[Any]]  # prompts, seeds -> images, None where it refuses


@dataclass(frozen=True)
class System:
    """One column of the comparison.

    Args:
        generate: Prompts and seeds in, one `PIL` image each out, or None for a prompt that it refuses.
        description: One line for the report.
        extra_evaluations: evaluations of the denoiser per step on top of the base's, e.g. 1 where guidance looks at a third text.
        fingerprint: Changes whenever the images would; stored images of another fingerprint are not reused.
        ready: Entered around all generation, e.g. to load an adapter and to remove it again.
        listed: A list that it reads names held-out concepts, so that its figures for these are none of generalization.
        origins: Of the model that makes the images, see `valign.models.files.origin`; a detector with a domain asks for them.
        trainings: How many independent trainings the images come from; 0 where nothing was trained.
        elsewhere: Its images were made by another tool: handing them out has no cost worth a figure.
    """

    name: str
    generate: Generate
    description: str = ""
    extra_evaluations: float = 0.0
    fingerprint: str = ""
    ready: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext, compare=False)
    listed: bool = False
    origins: tuple[str, ...] = ()
    trainings: int = 0
    elsewhere: bool = False

    def __post_init__(self) -> None:
        if not FILE_NAME.fullmatch(self.name):
            raise UserError(f"System name must be letters, digits, dot, dash or underscore, got {self.name!r}. It names a folder.")


def base_system(model: "DiffusionModel", sampling: SamplingConfig, *, name: str = "base") -> System:
    """The bare model: every other system is measured against it."""
    return System(
        name,
        _generator(model, None, sampling),
        "as published",
        fingerprint=model.fingerprint(),
        origins=model_origins(model.folder),
    )


def guided_system(
    model: "DiffusionModel",
    guidance: Guidance,
    sampling: SamplingConfig,
    *,
    name: str,
    description: str = "",
) -> System:
    """The model under another guidance (negative prompt, Safe Latent Diffusion): no training, at a price per image."""
    if sampling.guidance_scale <= 1:
        raise UserError(f"{name} needs guidance_scale above 1, got {sampling.guidance_scale}. Without guidance it changes nothing.")
    return System(
        name,
        _generator(model, guidance, sampling),
        description,
        extra_evaluations=float(len(guidance.texts)),
        fingerprint=f"{model.fingerprint()} {guidance!r}",
        origins=model_origins(model.folder),
    )


def adapter_system(
    model: "DiffusionModel",
    folder: str | Path,
    sampling: SamplingConfig,
    *,
    name: str,
    weight: float = 1.0,
    description: str = "",
    anyway: bool = False,
) -> System:
    """The model with a trained or merged adapter, loaded while it generates and removed after.

    Args: anyway: Also take an adapter whose record names another model.
    """
    from valign.models.diffusion.adapter_base import check_base
    from valign.models.files.adapter_files import open_adapter

    check_base(model, open_adapter(folder), anyway=anyway)
    return System(
        name,
        _generator(model, None, sampling),
        description or "LoRA adapter",
        fingerprint=f"{model.fingerprint()} {open_adapter(folder).fingerprint()} {weight}",
        ready=lambda: _loaded(model, folder, weight, anyway),
        origins=model_origins(model.folder),
        trainings=1,
    )


def value_system(
    pipeline: "ValueGuidedPipeline",
    sampling: SamplingConfig,
    *,
    name: str,
    mixing: float = 0.5,
    description: str = "",
) -> System:
    """The model with a value encoder; the pipeline's retriever decides which prompt gets which token.

    Args: mixing: Share of images that get the token of a bias principle.
    """
    if pipeline.retriever is None:
        raise UserError(f"{name} needs a pipeline with a retriever, got none. Without one no prompt would get a token.")

    def generate(prompts: list[str], seeds: list[int]) -> list[Image]:
        return pipeline.generate(prompts, seeds=seeds, sampling=sampling, mixing=mixing)

    return System(
        name,
        generate,
        description or "value encoder",
        fingerprint=f"{pipeline.encoder.fingerprint()} {pipeline.retriever.fingerprint()} {mixing}",
        origins=model_origins(pipeline.model.folder),
        trainings=1,
    )


@contextmanager
def _loaded(model: "DiffusionModel", folder: str | Path, weight: float, anyway: bool) -> Iterator[None]:
    from valign.models.diffusion.lora import load_adapter, unload_adapters

    load_adapter(model, folder, name="evaluated", weight=weight, anyway=anyway)
    try:
        yield
    finally:
        unload_adapters(model)


def _generator(model: "DiffusionModel", guidance: Guidance | None, sampling: SamplingConfig) -> Generate:
    def generate(prompts: list[str], seeds: list[int]) -> list[Image]:
        return model.generate(prompts, seeds=seeds, sampling=sampling, guidance=guidance)

    return generate
