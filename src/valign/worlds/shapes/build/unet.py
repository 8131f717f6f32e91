"""Train the denoising U-Net on cached latents, under a text encoder that stays as it is, and assemble the pipeline."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from valign.files import atomic_path
from valign.progress import track
from valign.worlds.shapes.build.clip import WIDTH
from valign.worlds.shapes.build.examples import examples, wording
from valign.worlds.shapes.build.fit import Budget, fit
from valign.worlds.shapes.build.tokenizer import tokenize
from valign.worlds.shapes.build.vae import LATENT_CHANNELS
from valign.worlds.shapes.grammar import training_example

BUDGET = Budget(steps=7000, batch=32, lr=1e-3, warmup=300, ema=0.999)
FURTHER = (  # from an earlier version's weights; a warm restart of the learning rate between the rounds
    Budget(steps=1500, batch=32, lr=8e-4, warmup=50, ema=0.995, checkpoint_every=250),
    Budget(steps=3000, batch=32, lr=7e-4, warmup=50, ema=0.998, checkpoint_every=200),
)
CHANNELS = (80, 160)
SCENES = 40_000  # images in the training set; their captions are worded anew every time
EMPTY = 0.1  # share of captions replaced by "", for guidance
MIN_SNR = 5.0


def new_unet() -> UNet2DConditionModel:
    """Two resolutions, 8 x 8 and 4 x 4 latents, with cross-attention at both; randomly initialized."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule, sampled by DDIM."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


@torch.no_grad()
def take_unet(
    net: UNet2DConditionModel, start: Path, text: CLIPTextModel, tokenizer: CLIPTokenizer, *, seed: int, captions: int = 1500
) -> None:
    """Copy the weights of ``start/unet`` and turn its cross-attention towards ``text``, in place.

    A matrix from the new encoder's states to the earlier one's is fitted by least squares, position by position, on captions that
    both tokenizers cut into equally many tokens; keys and values are multiplied by it.
    """
    net.load_state_dict(UNet2DConditionModel.from_pretrained(start / "unet").float().state_dict())
    earlier = CLIPTextModel.from_pretrained(start / "text_encoder").float().eval()
    words = CLIPTokenizer.from_pretrained(start / "tokenizer")
    rng = np.random.default_rng([seed, 15])
    chosen: list[str] = []
    while len(chosen) < captions:
        caption = training_example(rng)[1](rng)
        if len(words(caption).input_ids) == len(tokenizer(caption).input_ids) <= words.model_max_length:
            chosen.append(caption)
    length = min(words.model_max_length, tokenizer.model_max_length)
    ids = [
        tool(chosen, padding="max_length", max_length=length, truncation=True, return_tensors="pt") for tool in (tokenizer, words)
    ]
    new, old = (model(one.input_ids).last_hidden_state.flatten(0, 1).double() for model, one in zip((text, earlier), ids))
    ridge = 1e-3 * float(new.square().mean()) * len(new) * torch.eye(new.shape[1], dtype=torch.float64)
    turn = torch.linalg.solve(new.T @ new + ridge, new.T @ old)  # new @ turn is nearly old
    for name, weight in net.named_parameters():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            weight.copy_((weight.double() @ turn.T).float())


def cached_latents(vae: AutoencoderKL, path: Path, *, seed: int, count: int, batch: int = 100) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of the training images, ``[count, channel, 8, 8]``, made once."""
    if not path.exists():
        means, stds = [], []
        with torch.inference_mode():
            for start in track(range(0, count, batch), "latents"):
                posterior = vae.encode(examples(seed, range(start, min(start + batch, count)))[2]).latent_dist
                means.append(posterior.mean.half())
                stds.append(posterior.std.half())
        with atomic_path(path) as temporary:
            save_file({"mean": torch.cat(means), "std": torch.cat(stds)}, temporary)
    stored = load_file(path)
    return stored["mean"], stored["std"]


def train_unet(
    folder: Path,
    logs: Path,
    vae: AutoencoderKL,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    *,
    seed: int = 0,
    rounds: Sequence[Budget] = (BUDGET,),
    scenes: int = SCENES,
    start: Path | None = None,
) -> StableDiffusionPipeline:
    """Train on (latents, captions), epsilon prediction, min-SNR weighting; save the whole pipeline in half precision.

    Args:
        rounds: One after the other, each with a learning rate that rises and falls, on draws of its own.
        start: An earlier version's pipeline with the same latents; its U-Net goes on, fitted to the new text encoder.

    ``text`` is frozen, as in Stable Diffusion: trained on with the U-Net it forgets where things are, since early in the
    training the noise seems to tell more about places than the words do.
    """
    torch.manual_seed(seed)
    net = new_unet()
    text.requires_grad_(False).eval()
    if start is not None:
        take_unet(net, start, text, tokenizer, seed=seed)
    scheduler = new_scheduler()
    means, stds = cached_latents(vae, logs / "latents.safetensors", seed=seed + 20, count=scenes)
    says = [wording(seed + 20, i) for i in track(range(scenes), "captions")]
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)

    def loss(step: int, *, first: int, batch: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([seed, 7, first + step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        rows = rng.integers(scenes, size=batch)
        mean, std = means[rows].float(), stds[rows].float()
        latents = (mean + std * torch.randn(mean.shape, generator=generator)) * vae.config.scaling_factor
        ids = tokenize(tokenizer, ["" if rng.random() < EMPTY else says[row](rng) for row in rows])
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (batch,), generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.no_grad():
            states = text(ids).last_hidden_state
        predicted = net(noisy, timesteps, encoder_hidden_states=states).sample
        error = (predicted - noise).square().mean(dim=(1, 2, 3))
        weight = (MIN_SNR / snr[timesteps]).clamp(max=1)
        return {"loss": (weight * error).mean(), "mse": error.mean()}

    first = 0
    for number, budget in enumerate(rounds, start=1):
        name = "unet" if number == 1 else f"unet-{number}"
        fit(net, partial(loss, first=first, batch=budget.batch), budget, logs, name)
        first += budget.steps
    vae.register_to_config(_name_or_path="")  # no path of the building machine
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=net,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(folder)
    return pipe.to(torch.float32)
