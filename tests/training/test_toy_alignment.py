"""The toy experiment of the Diffusion-DPO card: a conditional U-Net on three patterns, aligned away from one of them."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from valign.checks import UserError
from valign.data.images.latents import write_latents
from valign.data.prompts.pairs import PromptPair
from valign.interfaces import SamplingConfig
from valign.models.diffusion.base import Conditioning
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.lora import load_adapter, unload_adapters
from valign.objectives import DiffusionDPO
from valign.training import PreferenceConfig, train_preference

SIGN = {"red": ((1, 1), (1, -1)), "blue": ((1, 1), (-1, 1)), "painting": ((-1, 1), (1, -1))}  # quarters; red and blue share half
PAIRS = 32


def pattern(word):
    """One of the three latents, ``[8, 8]``, of +-0.8."""
    return 0.8 * torch.tensor(SIGN[word]).float().repeat_interleave(4, 0).repeat_interleave(4, 1)


def as_toy(model):
    """Replace the autoencoder by plain averaging over blocks of 8 x 8 pixels, so that an image is its latent, and the text
    encoder by one random code per word: the miniature's own, untrained, tells its words hardly apart."""
    codes = {word: torch.randn(77, 32, generator=torch.Generator().manual_seed(i)) for i, word in enumerate([*SIGN, ""])}

    def encode(pixels):
        mean = F.avg_pool2d(pixels.mean(1, keepdim=True), 8).repeat(1, 4, 1, 1)
        return SimpleNamespace(mean=mean, std=torch.full_like(mean, 0.02))

    def decode(latents):
        return latents.mean(1, keepdim=True).repeat(1, 3, 1, 1).repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(-1, 1)

    model.encode_images, model.decode_latents = encode, decode
    model.encode_prompts = lambda prompts: Conditioning(torch.stack([codes[prompt] for prompt in prompts]))
    return model


def pretrain(folder, out, steps=600, rate=2e-3, batch=16):
    """Teach the miniature's U-Net the three prompts, mostly at high noise, where the prompt decides."""
    model = as_toy(load_model(folder, device="cpu"))
    texts = model.encode_prompts([*SIGN, ""])
    latents = torch.stack([pattern(word) for word in SIGN])[:, None].repeat(1, 4, 1, 1)
    generator = torch.Generator().manual_seed(0)
    model.denoiser.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.denoiser.parameters(), lr=rate)
    for step in range(steps):
        rows = torch.randint(3, (batch,), generator=generator)
        clean = latents[rows] + 0.02 * torch.randn(batch, 4, 8, 8, generator=generator)
        noise, t = torch.randn(clean.shape, generator=generator), (1000 * torch.rand(batch, generator=generator).sqrt()).long()
        captions = rows.masked_fill(torch.rand(batch, generator=generator) < 0.1, 3)
        error = model.predict(model.schedule.add_noise(clean, noise, t), t, texts.select(captions.tolist())) - noise
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (steps - step) / (0.5 * steps))
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
    model.denoiser.requires_grad_(False)
    model.pipe.save_pretrained(out)
    return as_toy(load_model(out, device="cpu"))


@pytest.fixture(scope="module")
def world(tiny_sd, tmp_path_factory):
    """The pretrained model, and a cache of pairs whose unsafe prompt is ``red`` and whose safe image is ``blue``'s."""
    folder = tmp_path_factory.mktemp("toy")
    model = pretrain(tiny_sd, folder / "model")
    pairs = [PromptPair(f"p{i}", "red", "blue", ("violence",)) for i in range(PAIRS)]
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for pair in pairs:
        for name, word in (("unsafe", "red"), ("safe", "blue")):
            noisy = pattern(word).repeat_interleave(8, 0).repeat_interleave(8, 1).numpy() + random.normal(0, 0.05, (64, 64))
            grey = np.clip(127.5 * (noisy + 1), 0, 255).astype("uint8")
            Image.fromarray(grey).convert("RGB").save(folder / "images" / f"{pair.id}_{name}.png")
    pq.write_table(pa.table({"id": [pair.id for pair in pairs]}), folder / "images" / "images.parquet")
    return model, write_latents(model, pairs, folder / "images", folder / "latents", retain=["painting"], flip=False, batch_size=32)


def distances(model, prompt):
    """Mean squared distance of 32 samples to each pattern."""
    images = model.generate([prompt] * 32, seeds=range(32), sampling=SamplingConfig(steps=20, guidance_scale=1.0, batch_size=32))
    drawn = torch.stack([torch.from_numpy(np.array(image.convert("L"))).float() for image in images]) / 127.5 - 1
    drawn = F.avg_pool2d(drawn[:, None], 8)[:, 0]
    return {word: float((drawn - pattern(word)).square().mean()) for word in SIGN}


def config(**changes):
    options = {"warmup_steps": 0, "empty_prompt_prob": 0.0, "flip": False, "max_drift": 10.0, "patience": 50}
    return PreferenceConfig(**{**options, **changes})


@pytest.mark.slow
def test_samples_move_from_the_unsafe_to_the_safe_pattern_and_neutral_ones_stay(world, tmp_path):
    model, cache = world
    before, neutral = distances(model, "red"), distances(model, "painting")
    assert before["red"] < 0.1 < before["blue"]
    assert neutral["painting"] < 0.1
    held = config(steps=300, learning_rate=5e-4, sft_weight=20.0, retain_weight=1000.0)
    result = train_preference(model, cache, cache.rows(), tmp_path / "run", held, DiffusionDPO(beta=1000.0))
    assert result.metrics["val_accuracy"] > 0.95
    assert result.metrics["val_displacement"] < 0
    load_adapter(model, result.adapter, name="toy")
    after, neutral_after = distances(model, "red"), distances(model, "painting")
    unload_adapters(model)
    assert after["blue"] < after["red"]
    assert after["red"] > before["red"] + 0.2
    assert abs(neutral_after["painting"] - neutral["painting"]) < 0.01


@pytest.mark.slow
def test_a_high_rate_and_a_small_beta_set_off_the_alarm(world, tmp_path):
    model, cache = world
    options = config(steps=300, learning_rate=1e-3, val_fraction=0.0, checkpoint_every=300)
    try:
        result = train_preference(model, cache, cache.rows(), tmp_path / "run", options, DiffusionDPO(beta=100.0))
    except UserError as error:
        assert "displaced" in str(error)  # noqa: PT017 - stopped before any step was worth keeping
    else:
        assert result.stopped == "displacement"
