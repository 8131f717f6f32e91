"""The sampler: prompts and seeds to images, with any scheduler, any guidance, from noise or from an image.

The same loop as diffusers' pipelines, with three differences: each image has its own seed, guidance is an object, and the
latents stay in float32 whatever precision the denoiser runs in. In float32 plain guidance gives what ``pipe(...)`` gives.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from valign.checks import SEEDS, check_range
from valign.interfaces import Guidance, SamplingConfig
from valign.models.diffusion.base import Conditioning, DiffusionModel
from valign.models.diffusion.guidance.base import classifier_free
from valign.models.images import pil_to_tensor, tensor_to_pil
from valign.progress import track

PROMPTS_KEPT = 1024  # encoded prompts held at once; a prompt that comes again sooner is not encoded again


@torch.inference_mode()
def generate(
    model: DiffusionModel,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    sampling: SamplingConfig = SamplingConfig(),
    guidance: Guidance | None = None,
    start: Sequence[Image] | None = None,
    strength: float = 0.7,
    toward: Sequence[tuple[int, float]] | None = None,
    progress: str | None = None,
) -> list[Image]:
    """One image per prompt, with the pipeline's own scheduler.

    Args:
        seeds: One per prompt; those of ``sampling`` where not given. Each image's noise is drawn by itself, on the CPU in float32,
            so an image depends on its prompt and seed only; another batch size changes it by rounding alone.
        sampling: With ``start``, ``int(steps * strength)`` of its steps are made.
        guidance: Negative prompt or Safe Latent Diffusion; needs a ``guidance_scale`` above 1.
        start: One image per prompt to start from (image to image), noised to ``strength`` in (0, 1].
        toward: Per prompt a second seed and a share in [0, 1]: the noise is turned from the first seed's to the second's by this
            share of a quarter circle, and so stays standard normal. 0 is the first seed's image, 1 the second's.
        progress: Title of a progress bar over the batches; none when not given.
    Raises: ValueError for unequal lengths, numbers out of range, or ``guidance`` without a scale above 1.
    """
    seeds = sampling.seeds(len(prompts)) if seeds is None else seeds
    _check(prompts, seeds, sampling, guidance, start, strength, toward)
    known: dict[str, Conditioning] = {}
    branches = []  # texts beside the prompt: the unconditional one, then those of the guidance
    if sampling.guidance_scale > 1:
        branches = [guidance.negative, *guidance.texts] if guidance is not None else [""]
    batches = range(0, len(prompts), sampling.batch_size)
    images: list[Image] = []
    with model.pool.together():
        beside = model.encode_prompts(branches) if branches else None
        for first in track(batches, progress) if progress else batches:
            rows = slice(first, first + sampling.batch_size)
            generators = _generators(seeds[rows])
            scheduler = deepcopy(model.pipe.scheduler)
            timesteps = _timesteps(scheduler, sampling.steps, model.device, strength if start is not None else None)
            latents = _first_latents(model, scheduler, generators, timesteps, start[rows] if start is not None else None)
            if toward is not None:
                latents = _turned(model, latents, scheduler.init_noise_sigma, toward[rows])
            conditioning = _assemble(_encode(model, prompts[rows], known), beside)
            latents = _denoise(
                model, scheduler, timesteps, latents, conditioning, sampling.guidance_scale, guidance, len(branches), generators
            )
            images += tensor_to_pil(model.decode_latents(latents))
    return images


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    for seed in seeds:
        check_range("seed", seed, low=SEEDS[0], high=SEEDS[1], hint="Torch takes no other.")
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def trajectory(
    model: DiffusionModel,
    latents: Float[Tensor, "batch channel height width"],
    conditioning: Conditioning,
    *,
    steps: int,
    stop: int,
) -> Iterator[int]:
    """Denoise without guidance and without fresh noise; yield the number of each step right before the denoiser is asked.

    Args:
        steps: Of the whole schedule.
        stop: Steps that are made, in [1, steps].
    """
    sampler = model.schedule.deterministic(steps, model.device)
    for step, t in enumerate(sampler.timesteps[:stop]):
        yield step
        answer = model.predict(latents, t.expand(len(latents)), conditioning).float()
        latents = sampler.step(answer, t, latents, return_dict=False)[0]


@torch.no_grad()
def sample_until(
    model: DiffusionModel, prompts: Sequence[str], *, stop: int, sampling: SamplingConfig, seeds: Sequence[int] | None = None
) -> tuple[Float[Tensor, "batch channel height width"], Tensor]:
    """Denoise only the first ``stop`` steps, all prompts at once; return what the denoiser would see next, and its timestep.

    Args:
        stop: In [0, ``sampling.steps``); 0 is pure noise.
        seeds: As in `generate`.
    Raises: ValueError for numbers out of range or unequal lengths.
    """
    steps, scale = sampling.steps, sampling.guidance_scale
    seeds = sampling.seeds(len(prompts)) if seeds is None else seeds
    _check(prompts, seeds, sampling, None, None, 1.0, None)
    check_range("sample_until.stop", float(stop), low=0.0, high=float(steps - 1))
    generators = _generators(seeds)
    scheduler = deepcopy(model.pipe.scheduler)
    timesteps = _timesteps(scheduler, steps, model.device, None)
    branches = [""] if scale > 1 else []
    conditioning = _assemble(model.encode_prompts(prompts), model.encode_prompts(branches) if branches else None)
    latents = _first_latents(model, scheduler, generators, timesteps, None)
    stop = min(stop * len(timesteps) // steps, len(timesteps) - 1)  # some schedulers evaluate the denoiser twice in a step
    latents = _denoise(model, scheduler, timesteps[:stop], latents, conditioning, scale, None, len(branches), generators)
    return scheduler.scale_model_input(latents, timesteps[stop]), timesteps[stop]


def _denoise(
    model: DiffusionModel,
    scheduler: Any,
    timesteps: Tensor,
    latents: Float[Tensor, "batch channel height width"],
    conditioning: Conditioning,
    scale: float,
    guidance: Guidance | None,
    branches: int,
    generators: list[torch.Generator],
) -> Float[Tensor, "batch channel height width"]:
    """The reverse process; all branches of a step go through the denoiser as one batch, in the order uncond, cond, extra."""
    combine = guidance.start() if guidance is not None else classifier_free
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    noisy_steps = {"generator": generators} if takes_generator else {}
    units = model.schedule.noise_units(timesteps)
    for step, t in enumerate(timesteps):
        noisy = scheduler.scale_model_input(torch.cat([latents] * (1 + branches)), t)
        answer = model.predict(noisy, t, conditioning).float()
        if branches:
            answer = combine(step, scale, *(units[step] * answer).chunk(1 + branches)) / units[step]
        latents = scheduler.step(answer, t, latents, **noisy_steps, return_dict=False)[0]
    return latents


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
    model: DiffusionModel,
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


def _turned(
    model: DiffusionModel, latents: Float[Tensor, "batch channel height width"], sigma: float, toward: Sequence[tuple[int, float]]
) -> Float[Tensor, "batch channel height width"]:
    """``cos(a) latents + sin(a) other``, with ``a`` the share of a quarter circle and ``other`` the second seed's noise."""
    others = [torch.randn(model.latent_shape, generator=one) for one in _generators([seed for seed, _ in toward])]
    angles = torch.tensor([share * math.pi / 2 for _, share in toward]).view(-1, 1, 1, 1).to(latents)
    return angles.cos() * latents + angles.sin() * sigma * torch.stack(others).to(latents)


def _encode(model: DiffusionModel, prompts: Sequence[str], known: dict[str, Conditioning]) -> Conditioning:
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
    sampling: SamplingConfig,
    guidance: Guidance | None,
    start: Sequence[Image] | None,
    strength: float,
    toward: Sequence[tuple[int, float]] | None,
) -> None:
    if isinstance(prompts, str):
        raise ValueError("generate.prompts must be a list of texts, got one text. Put it in brackets.")
    if len(seeds) != len(prompts):
        raise ValueError(f"generate.seeds must hold one seed per prompt, got {len(seeds)} for {len(prompts)} prompts.")
    if start is not None and len(start) != len(prompts):
        raise ValueError(f"generate.start must hold one image per prompt, got {len(start)} for {len(prompts)} prompts.")
    if toward is not None:
        if start is not None or len(toward) != len(prompts):
            raise ValueError(
                f"generate.toward must hold one seed and share per prompt, without start, got {len(toward)} for {len(prompts)} "
                f"prompts{' and a start' if start is not None else ''}."
            )
        for _, share in toward:
            check_range("generate.toward", share, low=0.0, high=1.0)
    if guidance is not None and sampling.guidance_scale <= 1:
        raise ValueError(
            f"generate.sampling.guidance_scale must be above 1 for {type(guidance).__name__}, got {sampling.guidance_scale:g}. "
            "Without classifier-free guidance it would do nothing."
        )
    if start is not None:
        check_range("generate.strength", strength, above=0.0, high=1.0)
        if int(sampling.steps * strength) < 1:
            raise ValueError(f"generate.strength {strength:g} leaves none of {sampling.steps} steps. Raise one of them.")
