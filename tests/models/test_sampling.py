"""The sampler against diffusers' pipelines, and what it promises: seeds, batches, guidance, image to image."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image

from valign.interfaces import SamplingConfig
from valign.models.diffusion.guidance.negative import NegativePrompt
from valign.models.diffusion.guidance.sld import SafeLatentDiffusion
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.sampling import generate
from valign.models.diffusion.schedule import LEAST_UNIT
from valign.models.images import pil_to_tensor

PROMPTS, SEEDS = ["a photo of a red man", "a painting", "the"], [3, 4, 5]


@pytest.fixture(params=["tiny_sd", "tiny_sd_v", "tiny_sdxl"])
def model(request):
    loaded = load_model(request.getfixturevalue(request.param))
    loaded.pipe.set_progress_bar_config(disable=True)
    return loaded


def generators(seeds=SEEDS):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pixels(images):
    return np.stack([np.asarray(image, dtype=int) for image in images])


def same(a, b):
    return np.array_equal(pixels(a), pixels(b))


@pytest.mark.parametrize("scale", [7.5, 1.0])
def test_plain_guidance_is_the_diffusers_pipeline(model, scale):
    theirs = model.pipe(PROMPTS, num_inference_steps=4, guidance_scale=scale, generator=generators()).images
    ours = model.generate(PROMPTS, seeds=SEEDS, sampling=SamplingConfig(steps=4, guidance_scale=scale))
    if model.schedule.kind == "epsilon":
        assert same(ours, theirs)  # the very same arithmetic, in the same order
    else:
        assert abs(pixels(ours) - pixels(theirs)).max() <= 1  # answers pass through noise units, one rounding more


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_any_scheduler_is_the_diffusers_pipeline(model, scheduler):
    model.pipe.scheduler = scheduler.from_config(model.pipe.scheduler.config)
    theirs = model.pipe(PROMPTS, num_inference_steps=3, generator=generators(), guidance_scale=3.0).images
    ours = model.generate(PROMPTS, seeds=SEEDS, sampling=SamplingConfig(steps=3, guidance_scale=3.0))
    assert abs(pixels(ours) - pixels(theirs)).max() <= 1


def test_negative_prompt_is_the_diffusers_pipeline(model):
    theirs = model.pipe(
        PROMPTS, negative_prompt=["blue"] * 3, num_inference_steps=3, generator=generators(), guidance_scale=7.5
    ).images
    ours = model.generate(PROMPTS, seeds=SEEDS, guidance=NegativePrompt("blue"), sampling=SamplingConfig(steps=3))
    assert abs(pixels(ours) - pixels(theirs)).max() <= 1
    assert not same(ours, model.generate(PROMPTS, seeds=SEEDS, sampling=SamplingConfig(steps=3)))


def test_empty_negative_prompt_is_the_default_bit_for_bit(model):
    plain = model.generate(PROMPTS, seeds=SEEDS, sampling=SamplingConfig(steps=3))
    assert same(model.generate(PROMPTS, seeds=SEEDS, guidance=NegativePrompt(""), sampling=SamplingConfig(steps=3)), plain)


def test_image_to_image_is_the_diffusers_pipeline(model):
    start = [Image.effect_noise((64, 64), 80).convert("RGB") for _ in PROMPTS]
    kind = StableDiffusionXLImg2ImgPipeline if model.family == "sdxl" else StableDiffusionImg2ImgPipeline
    parts = {"requires_safety_checker": False} if model.family != "sdxl" else {"add_watermarker": False}
    pipe = kind(**model.pipe.components, **parts)
    if model.family == "sdxl":
        pipe.register_to_config(force_zeros_for_empty_prompt=True)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(PROMPTS, image=start, num_inference_steps=5, strength=0.7, generator=generators(), guidance_scale=4.0).images
    ours = model.generate(PROMPTS, seeds=SEEDS, strength=0.7, start=start, sampling=SamplingConfig(steps=5, guidance_scale=4.0))
    assert abs(pixels(ours) - pixels(theirs)).max() <= 1
    assert not same(
        ours, model.generate(PROMPTS, seeds=SEEDS, strength=0.4, start=start, sampling=SamplingConfig(steps=5, guidance_scale=4.0))
    )


def test_a_image_depends_on_its_prompt_and_seed_only(model):
    together = pixels(model.generate(PROMPTS, seeds=SEEDS, sampling=SamplingConfig(steps=3, batch_size=8)))
    alone = pixels(model.generate(PROMPTS, seeds=SEEDS, sampling=SamplingConfig(steps=3, batch_size=1)))
    turned = pixels(model.generate(PROMPTS[::-1], seeds=SEEDS[::-1], sampling=SamplingConfig(steps=3, batch_size=2)))
    assert abs(together - alone).max() <= 1
    assert abs(together - turned[::-1]).max() <= 1


def test_a_call_leaves_nothing_behind(model):
    before = dict(model.pipe.scheduler.__dict__)
    state = torch.random.get_rng_state()
    first = model.generate(PROMPTS, seeds=SEEDS, sampling=SamplingConfig(steps=3))
    assert model.pipe.scheduler.__dict__.keys() == before.keys()
    assert getattr(model.pipe.scheduler, "num_inference_steps", None) is None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(model.generate(PROMPTS, seeds=SEEDS, sampling=SamplingConfig(steps=3)), first)


def test_each_distinct_prompt_is_encoded_once(tiny_sd, monkeypatch):
    model, seen = load_model(tiny_sd), []
    encode = model.encode_prompts
    monkeypatch.setattr(model, "encode_prompts", lambda prompts: seen.extend(prompts) or encode(prompts))
    model.generate(["a", "b", "a", "a", "b"], seeds=range(5), sampling=SamplingConfig(steps=1, batch_size=2))
    assert sorted(seen) == ["", "a", "b"]


def test_no_prompts_no_images(tiny_sd):
    assert load_model(tiny_sd).generate([], seeds=[], sampling=SamplingConfig(steps=2)) == []


def test_prompts_need_not_be_known_for_ever(tiny_sd, monkeypatch):
    monkeypatch.setattr("valign.models.diffusion.sampling.PROMPTS_KEPT", 0)
    model = load_model(tiny_sd)
    a, b, again = model.generate(["a", "b", "a"], seeds=[0, 0, 0], sampling=SamplingConfig(steps=2, batch_size=1))
    assert same([a], [again])
    assert not same([a], [b])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1]}, r"generate\.seeds must hold one seed per prompt, got 1 for 3"),
        ({"prompts": "abc"}, r"generate\.prompts must be a list of texts, got one text"),
        ({"start": []}, r"generate\.start must hold one image per prompt, got 0 for 3"),
        ({"start": [Image.new("RGB", (9, 9))] * 3, "strength": 0.0}, r"generate\.strength must be in \(0, 1\], got 0"),
        (
            {"start": [Image.new("RGB", (9, 9))] * 3, "strength": 0.1, "sampling": SamplingConfig(steps=5)},
            r"generate\.strength 0\.1 leaves none of 5 steps",
        ),
        (
            {"guidance": NegativePrompt("blue"), "sampling": SamplingConfig(guidance_scale=1.0)},
            r"generate\.sampling\.guidance_scale must be above 1 for NegativePrompt, got 1",
        ),
        (
            {"guidance": SafeLatentDiffusion(), "sampling": SamplingConfig(guidance_scale=0.5)},
            r"must be above 1 for SafeLatentDiffusion, got 0\.5",
        ),
    ],
)
@pytest.mark.usefixtures("as_in_use")
def test_refuses_bad_arguments_before_any_work(change, message):
    with pytest.raises(ValueError, match=message):
        generate(object(), **{"prompts": PROMPTS, "seeds": SEEDS, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, r"SamplingConfig\.steps must be in \[1, inf\), got 0"),
        ({"batch_size": 0}, r"SamplingConfig\.batch_size must be in \[1, inf\), got 0"),
        ({"guidance_scale": -1.0}, r"SamplingConfig\.guidance_scale must be in \[0, inf\), got -1"),
        ({"guidance_scale": float("nan")}, r"SamplingConfig\.guidance_scale must be in"),
    ],
)
def test_refuses_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**change)


def test_start_images_of_any_size_are_cropped_to_the_models_square():
    wide = Image.new("RGB", (40, 20), "black")
    wide.paste("white", (10, 0, 30, 20))  # the middle square
    assert (pil_to_tensor([wide.convert("RGBA")], 64)[..., 2:-2] == 1).all()


def test_seeds_count_on_from_the_configs_where_none_are_given(tiny_sd):
    model = load_model(tiny_sd)
    counted = model.generate(PROMPTS, sampling=SamplingConfig(steps=2, seed=5))
    assert same(counted, model.generate(PROMPTS, seeds=[5, 6, 7], sampling=SamplingConfig(steps=2)))
    assert not same(counted, model.generate(PROMPTS, sampling=SamplingConfig(steps=2, seed=6)))


def test_schedules_that_end_in_pure_noise(tiny_sd_v, tmp_path):  # zero terminal signal-to-noise ratio, arXiv 2305.08891
    folder = shutil.copytree(tiny_sd_v, tmp_path / "zero")
    path = folder / "scheduler/scheduler_config.json"
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    model = load_model(folder)
    model.pipe.set_progress_bar_config(disable=True)
    theirs = model.pipe(PROMPTS, num_inference_steps=3, generator=generators()).images
    ours = model.generate(PROMPTS, seeds=SEEDS, sampling=SamplingConfig(steps=3))
    assert model.schedule.noise_units(torch.tensor([999])) == [pytest.approx(LEAST_UNIT)]
    assert abs(pixels(ours) - pixels(theirs)).max() <= 1
    model.generate(PROMPTS, seeds=SEEDS, guidance=SafeLatentDiffusion.preset("max"), sampling=SamplingConfig(steps=3))
