"""What is attacked: a prompt guard, a model, an adapter and an image check as one system; and the model from inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Real
from PIL.Image import Image
from torch import Tensor

from valign.attacks.base import QueryMeter, SystemAnswer
from valign.checks import UserError
from valign.evaluation.suite import FILE_NAME
from valign.evaluation.systems import System
from valign.files import hash_value
from valign.guard import Guard
from valign.guard.images.image_check import check_image
from valign.interfaces import Detector, Guidance
from valign.models.diffusion.base import Conditioning, DiffusionModel
from valign.models.diffusion.guidance.base import classifier_free
from valign.models.diffusion.lora import adapter_names, adapter_off
from valign.text import fold

LATE = 10**6  # a step behind the warm-up of any guidance


@dataclass(frozen=True)
class OpenModel:
    """The attacked model from inside: a diffusion model with its loaded adapter, under its guidance.

    Args: scale: Of classifier-free guidance; used where there is another guidance, which only then enters the answers.
    """

    model: DiffusionModel
    guidance: Guidance | None = None
    scale: float = 7.5

    def predict(
        self, noisy: Float[Tensor, "batch channel height width"], timesteps: Real[Tensor, "..."], conditioning: Conditioning
    ) -> Float[Tensor, "batch channel height width"]:
        """The attacked model's answer, float32: of the denoiser to the prompt, or under the guidance as behind its warm-up."""
        answer = self.model.predict(noisy, timesteps, conditioning).float()
        if self.guidance is None:
            return answer
        return self._combined(self.guidance.start(), answer, noisy, timesteps, [self.guidance.negative, *self.guidance.texts])

    @torch.no_grad()
    def reference(
        self, noisy: Float[Tensor, "batch channel height width"], timesteps: Real[Tensor, "..."], conditioning: Conditioning
    ) -> Float[Tensor, "batch channel height width"]:
        """The published model's answer, float32: without adapter, and with plain guidance where the attacked one has another."""
        with adapter_off(self.model) if adapter_names(self.model) else nullcontext():
            answer = self.model.predict(noisy, timesteps, conditioning).float()
            return answer if self.guidance is None else self._combined(classifier_free, answer, noisy, timesteps, [""])

    def _combined(self, combine: Any, answer: Tensor, noisy: Tensor, timesteps: Tensor, texts: Sequence[str]) -> Tensor:
        unit = self.model.schedule.noise_units(timesteps.flatten()[:1])[0]
        with torch.no_grad():
            beside = self.model.encode_prompts(texts)
            branches = [
                self.model.predict(noisy, timesteps, beside.select([row] * len(noisy))).float() for row in range(len(texts))
            ]
        uncond, *extra = (unit * branch for branch in branches)
        combined: Tensor = combine(LATE, self.scale, uncond, unit * answer, *extra)
        return combined / unit


@dataclass(frozen=True)
class AttackTarget:
    """One attacked system. Give its image check to the guard as ``detector`` where there is a guard, else as ``check``.

    Args:
        generate: Caption and seed -> image, of the model with its adapter or guidance.
        white: For attacks that need gradients; None for a system that is known from outside only.
        encoder: Of the published model, for attacks that need its text encoder.
        ready: Entered around all questions, e.g. to load an adapter.
    """

    name: str
    generate: Callable[[str, int], Image]
    guard: Guard | None = None
    check: Detector | None = None
    white: OpenModel | None = None
    encoder: DiffusionModel | None = None
    description: str = ""
    fingerprint: str = ""
    ready: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext, compare=False)
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not FILE_NAME.fullmatch(self.name.replace("+", "-")):
            raise UserError(f"AttackTarget.name must be letters, digits, dot, dash, plus or underscore, got {self.name!r}.")
        if self.guard is not None and self.check is not None:
            raise UserError(f"{self.name} has a guard, which looks at the images itself. Give the detector to the guard.")

    @property
    def image_check(self) -> Detector | None:
        return self.check if self.guard is None else self.guard.detector

    def listed(self) -> frozenset[str]:
        """Words that the guard's policy lists, folded; none without a guard."""
        if self.guard is None:
            return frozenset()
        concepts = [concept for category in self.guard.policy.categories for concept in category.concepts]
        return frozenset(word for concept in concepts for term in concept.terms for word in fold(term).split())

    def ask(self, prompt: str, seed: int, meter: QueryMeter) -> SystemAnswer:
        """Send one prompt; an image that the image check flags is not in the answer. Costs a query."""
        meter.queries += 1

        def generate(caption: str, number: int) -> Image:
            meter.images += 1
            return self.generate(caption, number)

        if self.guard is None:
            image = generate(prompt, seed)
            held_back = self.check is not None and check_image(self.check, image).fired
            return SystemAnswer(prompt, prompt, None if held_back else image, "image check" if held_back else "")
        try:
            result = self.guard.guard(prompt)
        except UserError:  # what the guard does not read, it does not let through
            return SystemAnswer(prompt, None, None, "guard")
        if result.prompt is None:
            return SystemAnswer(prompt, None, None, "guard")
        shown = self.guard.illustrate(generate, result, seed=seed)
        return SystemAnswer(prompt, result.prompt, shown.image, "image check" if shown.image is None else "")

    def lets_through(self, prompt: str) -> bool:
        """Whether the guard would pass the prompt as it is; without a guard any prompt. Not a query: the attacker has a copy."""
        return self.guard is None or self.guard.passes(prompt)


def target_of(
    system: System,
    *,
    name: str,
    guard: Guard | None = None,
    check: Detector | None = None,
    model: DiffusionModel | None = None,
    guidance: Guidance | None = None,
    scale: float = 7.5,
    inside: bool = True,
) -> AttackTarget:
    """A system of an evaluation as a target.

    Args:
        guard: Stands before it; it judges also what ``model`` reads of a long prompt.
        model: That ``system`` generates with. Its inside is seen where it has one text encoder, since no attack can use two.
        guidance, scale: That the system generates under.
        inside: Whether the attacker sees the model; the published text encoder is seen in any case.
    """
    single = model if model is not None and len(model.text_encoders) == 1 else None
    if guard is not None and model is not None:
        guard = guard.for_model(model)
    watcher = check if guard is None else guard.detector
    parts = [system.fingerprint, guard.fingerprint() if guard else "", watcher.card.weights_sha256 if watcher else ""]
    return AttackTarget(
        name=name,
        generate=lambda caption, seed: system.generate([caption], [seed])[0],
        guard=guard,
        check=check,
        white=OpenModel(single, guidance, scale) if single is not None and inside else None,
        encoder=single,
        description=system.description,
        fingerprint=hash_value(parts),
        ready=system.ready,
        origins=system.origins,
    )
