"""Animations: the path of noise between two seeds, and what they refuse."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from valign.interfaces import Animator, SamplingConfig
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.sampling import _turned

SAMPLING = SamplingConfig(steps=3, guidance_scale=5.0)


@pytest.fixture
def model(tiny_sd):
    loaded = load_model(tiny_sd)
    loaded.pipe.scheduler = DDIMScheduler.from_config(loaded.pipe.scheduler.config)  # no noise of its own
    return loaded


def pixels(images):
    return np.stack([np.asarray(image, dtype=int) for image in images])


def test_an_animation_starts_at_its_seed_and_ends_at_the_next(model):
    assert isinstance(model, Animator)
    clips = model.animate(["a painting", "the"], frames=3, seeds=[3, 9], sampling=SAMPLING)
    assert [len(clip) for clip in clips] == [3, 3]
    ends = model.generate(["a painting", "a painting", "the", "the"], seeds=[3, 4, 9, 10], sampling=SAMPLING)
    assert abs(pixels([clips[0][0], clips[0][2], clips[1][0], clips[1][2]]) - pixels(ends)).max() <= 1  # batches round otherwise
    assert abs(pixels(clips[0][:1]) - pixels(clips[0][1:2])).max() > 1
    again = model.animate(["the"], frames=3, sampling=SamplingConfig(steps=3, guidance_scale=5.0, seed=9))
    assert abs(pixels(again[0]) - pixels(clips[1])).max() <= 1


def test_the_noise_turns_on_a_circle(model):
    own, other = (torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    half = _turned(model, own[None], 1.0, [(2, 0.5)])
    torch.testing.assert_close(half[0], (own + other) / 2**0.5)  # cos 45 = sin 45 = 1 / sqrt 2: the variance stays 1
    doubled = _turned(model, 2 * own[None], 2.0, [(2, 1 / 3)])  # cos 30 = sqrt 3 / 2, sin 30 = 1 / 2; a scheduler's sigma of 2
    torch.testing.assert_close(doubled[0], 3**0.5 * own + other)


def test_bad_input(model):
    with pytest.raises(ValueError, match=r"animate\.frames must be in \[2, inf\), got 1"):
        model.animate(["the"], frames=1)
    with pytest.raises(ValueError, match=r"generate\.toward must hold one seed and share per prompt, without start, got 2 for 1"):
        model.generate(["the"], toward=[(1, 0.0), (2, 0.5)])
    with pytest.raises(ValueError, match=r"generate\.toward must be in \[0, 1\], got 1.5"):
        model.generate(["the"], toward=[(1, 1.5)])
    start = model.generate(["the"], sampling=SAMPLING)
    with pytest.raises(ValueError, match="1 prompts and a start"):
        model.generate(["the"], start=start, toward=[(1, 0.5)])
