"""Safe Latent Diffusion against a NumPy transcription of its equations and against diffusers' deprecated pipeline."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from valign.interfaces import SamplingConfig
from valign.models.diffusion.guidance.base import classifier_free
from valign.models.diffusion.guidance.sld import PRESETS, SAFETY_TEXT, SafeLatentDiffusion, safety_scale
from valign.models.diffusion.loading import load_model

SHAPE = (2, 4, 3, 3)


def answers(step, spread=0.05):
    """Three noise estimates of one step: unconditional, prompt, safety text."""
    rng = np.random.default_rng(step)
    u = rng.standard_normal(SHAPE)
    return u, u + spread * rng.standard_normal(SHAPE), u + spread * rng.standard_normal(SHAPE)


def transcription(settings, steps, guidance_scale):
    """The equations of arXiv 2211.05105, one latent element at a time in float64; returns every step's estimate and momentum."""
    momentum, history = np.zeros(SHAPE), []
    for step in range(steps):
        u, c, k = answers(step)
        out = np.empty(SHAPE)
        for i in np.ndindex(SHAPE):
            s = 0.0 if c[i] - k[i] >= settings.threshold else min(abs(c[i] - k[i]) * settings.scale, 1.0)
            g = (k[i] - u[i]) * s + settings.momentum_scale * momentum[i]
            momentum[i] = settings.mom_beta * momentum[i] + (1 - settings.mom_beta) * g
            out[i] = u[i] + guidance_scale * ((c[i] - u[i]) - (g if step >= settings.warmup else 0.0))
        history.append((out, momentum.copy()))
    return history


@pytest.mark.parametrize("preset", PRESETS)
def test_the_equations(preset):
    settings = SafeLatentDiffusion.preset(preset)
    state = settings.start()
    for step, (expected, momentum) in enumerate(transcription(settings, 18, 7.5)):
        out = state(step, 7.5, *(torch.from_numpy(a) for a in answers(step)))
        assert_close(out.numpy(), expected, rtol=1e-12, atol=1e-12)
        assert_close(state.momentum.numpy(), momentum, rtol=1e-12, atol=1e-12)


def test_the_authors_table():
    rows = [tuple(row.values()) for row in PRESETS.values()]
    assert rows == [(15, 20, 0.0, 0.0, 0.0), (10, 1000, 0.01, 0.3, 0.4), (7, 2000, 0.025, 0.5, 0.7), (0, 5000, 1.0, 0.5, 0.7)]
    assert SafeLatentDiffusion() == SafeLatentDiffusion.preset("medium")
    assert SafeLatentDiffusion.preset("max", text="x", negative="y").texts == ("x",)
    assert SafeLatentDiffusion.preset("max", text="x", negative="y").negative == "y"


@pytest.mark.parametrize("preset", PRESETS)
def test_plain_guidance_when_nothing_passes_the_threshold_or_the_text_is_empty_of_meaning(preset):
    never = SafeLatentDiffusion(**{**PRESETS[preset], "threshold": float("-inf")}).start()
    meaningless = SafeLatentDiffusion.preset(preset).start()
    for step in range(18):
        u, c, k = (torch.from_numpy(a) for a in answers(step))
        plain = classifier_free(step, 5.0, u, c)
        assert torch.equal(never(step, 5.0, u, c, k), plain)
        assert torch.equal(meaningless(step, 5.0, u, c, u), plain)


def test_warm_up_is_plain_guidance_that_gathers_momentum():
    state = SafeLatentDiffusion(warmup=3).start()
    for step in range(4):
        u, c, k = (torch.from_numpy(a) for a in answers(step))
        before = state.momentum
        out = state(step, 5.0, u, c, k)
        assert torch.equal(out, classifier_free(step, 5.0, u, c)) == (step < 3)
        assert not torch.equal(state.momentum, torch.as_tensor(before).expand(SHAPE))


def test_the_strength_is_between_0_and_1():
    _, c, k = (torch.from_numpy(a) for a in answers(0, spread=3.0))
    for row in PRESETS.values():
        s = safety_scale(c, k, row["scale"], row["threshold"])
        assert ((s >= 0) & (s <= 1)).all()
        assert (s[c - k >= row["threshold"]] == 0).all()


def test_the_deprecated_diffusers_pipeline_gives_the_same_images(tiny_sd):
    from diffusers.pipelines.deprecated.stable_diffusion_safe import StableDiffusionPipelineSafe

    model = load_model(tiny_sd)
    reference = StableDiffusionPipelineSafe(**model.pipe.components, requires_safety_checker=False)
    reference.safety_concept = SAFETY_TEXT
    reference.set_progress_bar_config(disable=True)
    for preset, steps in (("strong", 9), ("max", 3)):
        settings = SafeLatentDiffusion.preset(preset)
        theirs = reference(
            ["a photo of a red man"],
            num_inference_steps=steps,
            guidance_scale=7.5,
            generator=torch.Generator().manual_seed(4),
            sld_guidance_scale=settings.scale,
            sld_warmup_steps=settings.warmup,
            sld_threshold=settings.threshold,
            sld_momentum_scale=settings.momentum_scale,
            sld_mom_beta=settings.mom_beta,
        ).images[0]
        prompt = {"prompts": ["a photo of a red man"], "seeds": [4], "sampling": SamplingConfig(steps=steps)}
        ours = model.generate(**prompt, guidance=settings)[0]
        assert abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
        assert np.asarray(ours).tolist() != np.asarray(model.generate(**prompt)[0]).tolist()


@pytest.mark.parametrize("folder", ["tiny_sd", "tiny_sd_v", "tiny_sdxl"])
def test_every_family_is_steered_and_batches_do_not_share_momentum(folder, request):
    model = load_model(request.getfixturevalue(folder))
    guidance = SafeLatentDiffusion.preset("max", text="a blue painting")
    prompts, seeds = ["a man", "the", "red"], [1, 2, 3]
    plain, steered, alone = (
        np.stack(
            [
                np.asarray(image, int)
                for image in model.generate(prompts, seeds=seeds, guidance=used, sampling=SamplingConfig(steps=3, batch_size=size))
            ]
        )
        for used, size in ((None, 8), (guidance, 8), (guidance, 1))
    )
    assert (abs(steered - plain).max(axis=(1, 2, 3)) > 1).all()
    assert abs(steered - alone).max() <= 1


def test_velocity_answers_are_weighed_in_noise_units(tiny_sd_v, tiny_sd):
    velocity, noise = load_model(tiny_sd_v), load_model(tiny_sd)
    timesteps = torch.tensor([1, 500, 999])
    assert noise.schedule.noise_units(timesteps) == [1.0, 1.0, 1.0]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)[timesteps].sqrt()
    assert_close(torch.tensor(velocity.schedule.noise_units(timesteps), dtype=torch.float64), alphas, rtol=1e-5, atol=0)
    # noise = a v + b x, so differences between two answers to the same x shrink by a
    x, v1, v2 = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = alphas[1]
    b = (1 - a**2).sqrt()
    assert_close((a * v1 + b * x) - (a * v2 + b * x), a * (v1 - v2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": " "}, "text must say what to avoid, got an empty text"),
        ({"warmup": -1}, r"warmup must be in \[0, inf\), got -1"),
        ({"scale": 0.0}, r"scale must be in \(0, inf\), got 0"),
        ({"momentum_scale": 1.5}, r"momentum_scale must be in \[0, 1\], got 1\.5"),
        ({"mom_beta": float("nan")}, r"mom_beta must be in \[0, 1\], got nan"),
        ({"threshold": float("nan")}, "threshold must be a number or -inf, got nan"),
    ],
)
def test_refuses_bad_settings(change, message):
    with pytest.raises(ValueError, match=rf"SafeLatentDiffusion\.{message}"):
        SafeLatentDiffusion(**change)


def test_refuses_an_unknown_preset():
    with pytest.raises(ValueError, match="preset must be one of weak, medium, strong, max; got 'extreme'"):
        SafeLatentDiffusion.preset("extreme")
