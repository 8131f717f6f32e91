"""Run the denoiser on prompts as calibration needs it: without guidance, deterministically, with looks at a few states."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from valign.merging.deltas import Delta, DenseDelta
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.sampling import trajectory
from valign.models.files.adapter_files import LoraFactors


def calibration_states(model: DiffusionModel, prompts: Sequence[str], *, states: int, steps: int, seed: int) -> Iterator[bool]:
    """Denoise the prompts as one batch; yield, right before each call of the denoiser, whether it is one to look at.

    ``states`` of ``steps`` are, the middles of equal parts of the trajectory, which ends at the last of them. A prompt's noise
    depends on ``seed`` and its text alone.
    """
    latents = torch.stack([torch.randn(model.latent_shape, generator=_noise(seed, prompt)) for prompt in prompts])
    wanted = [(2 * state + 1) * steps // (2 * states) for state in range(states)]
    conditioning = model.encode_prompts(prompts)
    for step in trajectory(model, latents.to(model.device), conditioning, steps=steps, stop=wanted[-1] + 1):
        yield step in wanted


def changed_output(output: Tensor, x: Tensor, part: Delta) -> Tensor:
    """A linear layer's output on ``x``, with one change of its weight added."""
    if isinstance(part, DenseDelta):
        return output + (x.to(part.matrix.dtype) @ part.matrix.T).to(output.dtype)
    return output + (x.to(part.down.dtype) @ part.down.T @ part.up.T).to(output.dtype)


def on_device(delta: Delta, device: torch.device) -> Delta:
    """The same change on another device."""
    if isinstance(delta, DenseDelta):
        return DenseDelta(delta.matrix.to(device))
    return LoraFactors(delta.down.to(device), delta.up.to(device), delta.scale)


def by_hash(texts: Sequence[str], seed: int) -> list[str]:
    """The distinct texts that are not blank, in an order that depends on ``seed`` and each text alone."""
    return sorted({text for text in texts if text.strip()}, key=lambda text: _digest(seed, text))


def _digest(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{text}".encode()).digest()


def _noise(seed: int, text: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(_digest(seed, text)[:8], "big") >> 1)
