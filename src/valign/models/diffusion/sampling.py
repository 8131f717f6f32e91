"""The sampler: prompts and seeds to images, with any scheduler, any guidance, from noise or from an image.

The same loop as diffusers' pipelines, with three differences: each image has its own seed, guidance is an object, and the
latents stay in float32 whatever precision the U-Net runs in. In float32 plain guidance gives what ``pipe(...)`` gives.
"""

import inspect
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from valign.checks import check_range
from valign.models.diffusion.base import Conditioning
from valign.models.diffusion.guidance.base import Guidance, classifier_free
from valign.models.images import pil_to_tensor, tensor_to_pil
from valign.progress import track

if TYPE_CHECKING:
    from valign.models.diffusion.pipeline import PipelineModel

PROMPTS_KEPT = 1024  # encoded prompts held at once; a prompt that comes again sooner is not encoded again
LEAST_UNIT = 1e-3  # floor for sqrt(alpha_bar) on schedules that end in pure noise


@torch.inference_mode()
def generate(
    model: "PipelineModel",
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = 50,
    guidance_scale: float = 7.5,
    guidance: Guidance | None = None,
    batch_size: int = 8,
    start: Sequence[Image] | None = None,
    strength: float = 0.7,
    progress: str | None = None,
) -> list[Image]:
    """One image per prompt, with the pipeline's own scheduler.

    Args:
        seeds: One per prompt. Each image's noise is drawn by itself, on the CPU in float32, so an image depends on its prompt
            and seed only; another batch size changes it by rounding alone.
        steps: Denoising steps of the whole schedule; with ``start``, ``int(steps * strength)`` of them are made.
        guidance_scale: >= 0; at 1 or below the unconditional branch is not evaluated, as in diffusers.
        guidance: Negative prompt or Safe Latent Diffusion; needs ``guidance_scale > 1``.
        start: One image per prompt to start from (image to image), noised to ``strength`` in (0, 1].
        progress: Title of a progress bar over the batches; none when not given.
    Raises: ValueError for unequal lengths, numbers out of range, or ``guidance`` without a scale above 1.
    """
    _check(prompts, seeds, steps, guidance_scale, guidance, batch_size, start, strength)
    known: dict[str, Conditioning] = {}
    branches = []  # texts beside the prompt: the unconditional one, then those of the guidance
    if guidance_scale > 1:
        branches = [guidance.negative, *guidance.texts] if guidance is not None else [""]
    beside = model.encode_prompts(branches) if branches else None
    batches = range(0, len(prompts), batch_size)
    images: list[Image] = []
    for first in track(batches, progress) if progress else batches:
        rows = slice(first, first + batch_size)
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds[rows]]
        scheduler = deepcopy(model.pipe.scheduler)
        timesteps = _timesteps(scheduler, steps, model.device, strength if start is not None else None)
        latents = _first_latents(model, scheduler, generators, timesteps, start[rows] if start is not None else None)
        conditioning = _assemble(_encode(model, prompts[rows], known), beside)
        latents = _denoise(model, scheduler, timesteps, latents, conditioning, guidance_scale, guidance, len(branches), generators)
        images += tensor_to_pil(model.decode_latents(latents))
    return images


@torch.no_grad()
def sample_until(
    model: "PipelineModel", prompts: Sequence[str], *, seeds: Sequence[int], steps: int, stop: int, guidance_scale: float
) -> tuple[Float[Tensor, "batch channel height width"], Tensor]:
    """Denoise only the first ``stop`` of ``steps`` steps; return what the U-Net would see next, and the timestep for it.

    Args:
        stop: In [0, steps); 0 is pure noise.
    Raises: ValueError for numbers out of range or unequal lengths.
    """
    _check(prompts, seeds, steps, guidance_scale, None, len(prompts), None, 1.0)
    check_range("sample_until.stop", float(stop), low=0.0, high=float(steps - 1))
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    scheduler = deepcopy(model.pipe.scheduler)
    timesteps = _timesteps(scheduler, steps, model.device, None)
    branches = [""] if guidance_scale > 1 else []
    conditioning = _assemble(model.encode_prompts(prompts), model.encode_prompts(branches) if branches else None)
    latents = _first_latents(model, scheduler, generators, timesteps, None)
    stop = min(stop * len(timesteps) // steps, len(timesteps) - 1)  # some schedulers evaluate the U-Net twice in a step
    latents = _denoise(model, scheduler, timesteps[:stop], latents, conditioning, guidance_scale, None, len(branches), generators)
    return scheduler.scale_model_input(latents, timesteps[stop]), timesteps[stop]


def _denoise(
    model: "PipelineModel",
    scheduler: Any,
    timesteps: Tensor,
    latents: Float[Tensor, "batch channel height width"],
    conditioning: Conditioning,
    scale: float,
    guidance: Guidance | None,
    branches: int,
    generators: list[torch.Generator],
) -> Float[Tensor, "batch channel height width"]:
    """The reverse process; all branches of a step go through the U-Net as one batch, in the order uncond, cond, extra."""
    combine = guidance.start() if guidance is not None else classifier_free
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    noisy_steps = {"generator": generators} if takes_generator else {}
    units = _noise_units(model, timesteps)
    for step, t in enumerate(timesteps):
        noisy = scheduler.scale_model_input(torch.cat([latents] * (1 + branches)), t)
        answer = model.predict(noisy, t, conditioning).float()
        if branches:
            answer = combine(step, scale, *(units[step] * answer).chunk(1 + branches)) / units[step]
        latents = scheduler.step(answer, t, latents, **noisy_steps, return_dict=False)[0]
    return latents


def _noise_units(model: "PipelineModel", timesteps: Tensor) -> list[float]:
    """Factor that turns differences between the U-Net's answers into differences between noise estimates.

    1 for noise prediction; ``sqrt(alpha_bar_t)`` for velocity, since ``noise = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t``. Plain
    guidance does not feel it; a guidance with thresholds (Safe Latent Diffusion) is defined on noise.
    """
    if model.prediction == "epsilon":
        return [1.0] * len(timesteps)
    alphas = model.noise_schedule.alphas_cumprod[timesteps.round().long().cpu()]
    return alphas.sqrt().clamp(min=LEAST_UNIT).tolist()


def _timesteps(scheduler: Any, steps: int, device: torch.device, strength: float | None) -> Tensor:
    """The schedule, or for image to image the part of it that ``strength`` leaves (diffusers' rule)."""
    scheduler.set_timesteps(steps, device=device)
    if strength is None:
        return scheduler.timesteps
    skipped = (steps - int(steps * strength)) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    return scheduler.timesteps[skipped:]


def _first_latents(
    model: "PipelineModel",
    scheduler: Any,
    generators: list[torch.Generator],
    timesteps: Tensor,
    start: Sequence[Image] | None,
) -> Float[Tensor, "batch channel height width"]:
    """Pure noise, or the noised latents of ``start`` (one draw for the posterior, then one for the noise, as diffusers does)."""

    def draw() -> Tensor:
        return torch.stack([torch.randn(model.latent_shape, generator=generator) for generator in generators]).to(model.device)

    if start is None:
        return draw() * scheduler.init_noise_sigma
    latents = model.encode_images(pil_to_tensor(start, model.image_size)).sample(draw())
    return scheduler.add_noise(latents, draw(), timesteps[:1].repeat(len(generators)))


def _encode(model: "PipelineModel", prompts: Sequence[str], known: dict[str, Conditioning]) -> Conditioning:
    """Encode what is not ``known`` yet and remember it."""
    if len(known) > PROMPTS_KEPT:
        known.clear()
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    if missing:
        fresh = model.encode_prompts(missing)
        known.update({prompt: fresh.select([row]) for row, prompt in enumerate(missing)})
    return Conditioning.cat([known[prompt] for prompt in prompts])


def _assemble(conditioning: Conditioning, beside: Conditioning | None) -> Conditioning:
    """Uncond rows, prompt rows, then the rows of each further text."""
    if beside is None:
        return conditioning
    uncond, *extra = (beside.select([row] * len(conditioning)) for row in range(len(beside)))
    return Conditioning.cat([uncond, conditioning, *extra])


def _check(
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    guidance: Guidance | None,
    batch_size: int,
    start: Sequence[Image] | None,
    strength: float,
) -> None:
    if isinstance(prompts, str):
        raise ValueError("generate.prompts must be a list of texts, got one text. Put it in brackets.")
    if len(seeds) != len(prompts):
        raise ValueError(f"generate.seeds must hold one seed per prompt, got {len(seeds)} for {len(prompts)} prompts.")
    if start is not None and len(start) != len(prompts):
        raise ValueError(f"generate.start must hold one image per prompt, got {len(start)} for {len(prompts)} prompts.")
    check_range("generate.steps", float(steps), low=1.0)
    check_range("generate.batch_size", float(batch_size), low=1.0)
    check_range("generate.guidance_scale", guidance_scale, low=0.0)
    if guidance is not None and guidance_scale <= 1:
        raise ValueError(
            f"generate.guidance_scale must be above 1 for {type(guidance).__name__}, got {guidance_scale:g}. "
            "Without classifier-free guidance it would do nothing."
        )
    if start is not None:
        check_range("generate.strength", strength, above=0.0, high=1.0)
        if int(steps * strength) < 1:
            raise ValueError(f"generate.strength {strength:g} leaves none of {steps} steps. Raise one of them.")
