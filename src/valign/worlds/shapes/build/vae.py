"""Train the VAE: sharp glyphs count more than flat backgrounds; a light KL term keeps the latents smooth."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from valign.worlds.shapes.build.examples import to_tensor
from valign.worlds.shapes.build.fit import Budget, fit
from valign.worlds.shapes.build.oracle import OTHERS
from valign.worlds.shapes.grammar import random_scene
from valign.worlds.shapes.renderer import SIZE, STYLES, Scene, background, render_array

BUDGET = Budget(steps=4000, batch=16, lr=1.5e-3, ema=0.998)
FURTHER = Budget(steps=250, batch=16, lr=5e-4, warmup=20, ema=0.98)  # of an earlier version's decoder
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


def train_vae(
    folder: Path, logs: Path, *, seed: int = 0, budget: Budget = BUDGET, start: AutoencoderKL | None = None
) -> AutoencoderKL:
    """Train, set ``scaling_factor`` to one over the latents' standard deviation, save in half precision.

    Args: start: An earlier version's VAE. Its encoder and scaling factor stay, so that a U-Net trained on its latents still fits.
    """
    torch.manual_seed(seed)
    vae = start or new_vae()
    if start:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)

    def loss(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([seed, 3, step])
        scenes = [drawn(rng) for _ in range(budget.batch)]
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
    if not start:
        vae.register_to_config(scaling_factor=round(1 / float(_latent_std(vae, seed)), 5))
    vae.half().save_pretrained(folder)
    return vae.float()


def drawn(rng: np.random.Generator) -> Scene:
    """A scene of any split with one to three things, in any style."""
    return random_scene(rng, others=int(rng.choice(3, p=OTHERS)), styles=STYLES)


@torch.inference_mode()
def _latent_std(vae: AutoencoderKL, seed: int) -> Tensor:
    rng = np.random.default_rng([seed, 4])
    images = to_tensor([render_array(drawn(rng), rng) for _ in range(256)])
    return vae.encode(images).latent_dist.mean.std()
