"""Train the VAE: sharp glyphs count more than flat backgrounds; a light KL term keeps the latents smooth."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from valign.worlds.shapes.build.examples import to_tensor
from valign.worlds.shapes.build.fit import Budget, fit
from valign.worlds.shapes.grammar import random_scene
from valign.worlds.shapes.renderer import SIZE, background, render_array

BUDGET = Budget(steps=4000, batch=16, lr=1.5e-3, ema=0.998)
CHANNELS = (16, 32, 64, 96)
LATENT_CHANNELS = 8
KL_WEIGHT = 2e-4  # per latent element, against an L1 error in [-1, 1]


def new_vae() -> AutoencoderKL:
    """The architecture, 64 px to 8 x 8 latents of 8 channels, randomly initialized."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        sample_size=SIZE,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def train_vae(folder: Path, logs: Path, *, seed: int = 0, budget: Budget = BUDGET) -> AutoencoderKL:
    """Train, set ``scaling_factor`` to one over the latents' standard deviation, save in half precision."""
    torch.manual_seed(seed)
    vae = new_vae()

    def loss(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([seed, 3, step])
        scenes = [random_scene(rng, other=rng.random() < 0.3) for _ in range(budget.batch)]
        images = to_tensor([render_array(scene, rng) for scene in scenes])
        empty = to_tensor([background(scene.background) for scene in scenes])
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
        error = vae.decode(posterior.mean + posterior.std * noise).sample - images
        ink = ((images - empty).abs().amax(1, keepdim=True) > 0.1).float()
        pixels = (error.abs() * (1 + 3 * ink)).mean()
        edges = (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2
        kl = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
        return {"loss": pixels + edges + KL_WEIGHT * kl, "pixels": pixels, "edges": edges, "kl": kl}

    fit(vae, loss, budget, logs, "vae")
    vae.register_to_config(scaling_factor=round(1 / float(_latent_std(vae, seed)), 5))
    vae.half().save_pretrained(folder)
    return vae.float()


@torch.inference_mode()
def _latent_std(vae: AutoencoderKL, seed: int) -> Tensor:
    rng = np.random.default_rng([seed, 4])
    images = to_tensor([render_array(random_scene(rng, other=rng.random() < 0.3), rng) for _ in range(256)])
    return vae.encode(images).latent_dist.mean.std()
