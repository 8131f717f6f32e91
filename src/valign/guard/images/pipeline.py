"""A diffusers pipeline inside the guard: called like the pipeline, returns checked images only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from valign.checks import UserError
from valign.guard.guard import Guard
from valign.guard.records import GuardedImage
from valign.guard.request import RequestGuard
from valign.guard.waterfall import require_prompt
from valign.interfaces import ReadsText
from valign.models.diffusion.text_reader import TextReader, encoder_limit

USUAL_GUIDANCE = 7.5  # of a pipeline that is not told otherwise
REFUSED = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "ip_adapter_image", "ip_adapter_image_embeds")


@dataclass(frozen=True)
class GuardedOutput:
    """``images[i]`` is None where prompt i was blocked; ``records`` say why."""

    images: list[Image | None]
    records: list[GuardedImage]

    @property
    def nsfw_content_detected(self) -> list[bool]:
        """As diffusers names it: True where there is no image."""
        return [image is None for image in self.images]


class GuardedPipeline:
    """``GuardedPipeline(pipe, guard)(prompt, seed=0, num_inference_steps=30)``.

    Only what the guard can read gets through: embeddings and second prompts are refused, and so is any output but PIL images.
    """

    def __init__(self, pipe: Any, guard: Guard) -> None:
        """Raises: UserError for a guard with a value token and a pipeline that cannot give it."""
        if guard.token is not None and getattr(pipe, "encoder", None) is not guard.token.encoder:
            raise UserError(
                "A guard with a value token needs a ValueGuidedPipeline with the same encoder. Put one around the pipeline."
            )
        self.pipeline, self.guard = pipe, guard.for_model(_reader(pipe))

    def __call__(self, prompt: str | Sequence[str], *, seed: int = 0, **options: Any) -> GuardedOutput:
        """One image per prompt; prompt i has seed ``seed + i``, further attempts count on from 1,000,000 more.

        What the pipeline raises is passed on.
        Raises: UserError for options that the guard cannot read, and as `Guard.check`, before anything is generated.
        """
        wrong = [name for name, value in options.items() if value is not None and (name in REFUSED or name.startswith("prompt_"))]
        if wrong:
            raise UserError(f"GuardedPipeline takes no {', '.join(wrong)}: the guard cannot read it. Give one text prompt.")
        for name, only in (("output_type", "pil"), ("num_images_per_prompt", 1), ("return_dict", True)):
            if options.setdefault(name, only) != only:
                raise UserError(f"GuardedPipeline.{name} must be {only!r}, got {options[name]!r}. Take it out.")
        if "generator" in options:
            raise UserError("GuardedPipeline takes a seed, got a generator. Give seed=NUMBER.")
        for name in [name for name, value in options.items() if name.startswith("negative_prompt") and value]:
            guidance = options.get("guidance_scale")
            options[name] = self._negative(options[name], USUAL_GUIDANCE if guidance is None else guidance)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        for text in prompts:
            require_prompt(self.guard.policy, text)
        records = [self._one(text, seed + number, options) for number, text in enumerate(prompts)]
        return GuardedOutput([record.image for record in records], records)

    def _negative(self, texts: str | Sequence[str], guidance: float) -> str | list[str]:
        """Negative prompts as they may be used; nothing of one that must not be."""
        requests = RequestGuard(self.guard)
        found = [requests.negative(text, guidance) or "" for text in ([texts] if isinstance(texts, str) else texts)]
        return found[0] if isinstance(texts, str) else found

    def _one(self, prompt: str, seed: int, options: dict[str, Any]) -> GuardedImage:
        def generate(caption: str, number: int) -> Image:
            chosen = seed if number == seed else number + 1_000_000
            images = self.pipeline(prompt=caption, generator=torch.Generator().manual_seed(chosen), **options).images
            found: Image = images[0]
            return found

        return self.guard.illustrate(generate, self.guard.guard(prompt), seed=seed)


def _reader(pipe: Any) -> object:
    """What says how much of a prompt the pipeline reads; anything else where it cannot say."""
    if isinstance(model := getattr(pipe, "model", None), ReadsText):  # of a ValueGuidedPipeline
        return model
    known = all(hasattr(pipe, name) for name in ("tokenizer", "text_encoder", "maybe_convert_prompt"))
    return TextReader(pipe, encoder_limit(pipe)) if known else pipe
