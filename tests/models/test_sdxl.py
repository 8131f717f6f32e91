"""Stable Diffusion XL against diffusers' own pipeline."""

import pytest
import torch

from valign.models.diffusion.loading import load_model

PROMPTS = ["a photo of a red man", "the"]


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl):
    return load_model(tiny_sdxl)


def test_what_it_says_of_itself(sdxl):
    assert (sdxl.family, sdxl.schedule.kind, sdxl.latent_shape, sdxl.image_size) == ("sdxl", "epsilon", (4, 8, 8), 64)
    assert not any(p.requires_grad for p in sdxl.pipe.text_encoder_2.parameters())


def test_prompts_are_encoded_as_diffusers_does_bit_for_bit(sdxl):
    embeds, _, pooled, _ = sdxl.pipe.encode_prompt(PROMPTS, device="cpu")
    ours = sdxl.encode_prompts(PROMPTS)
    assert torch.equal(ours.embeds, embeds)
    assert torch.equal(ours.pooled, pooled)
    ids = sdxl.pipe._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, sdxl.pipe.text_encoder_2.config.projection_dim)
    assert torch.equal(ours.time_ids, ids.repeat(2, 1))


def test_the_empty_prompt_is_the_unconditional_branch(sdxl, tiny_sdxl):
    _, uncond, _, pooled = sdxl.pipe.encode_prompt("the", device="cpu", do_classifier_free_guidance=True)
    ours = sdxl.encode_prompts(["", "the"])
    assert torch.equal(ours.embeds[:1], uncond)
    assert torch.equal(ours.pooled[:1], pooled)
    assert not uncond.any()
    assert ours.embeds[1].any()
    other = load_model(tiny_sdxl)
    other.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    _, uncond, _, pooled = other.pipe.encode_prompt("the", device="cpu", do_classifier_free_guidance=True)
    assert torch.equal(other.encode_prompts([""]).embeds, uncond)
    assert torch.equal(other.encode_prompts([""]).pooled, pooled)
    assert uncond.any()


def test_predict_uses_every_part_of_the_conditioning(sdxl):
    noisy, conditioning = torch.ones(1, 4, 8, 8), sdxl.encode_prompts(["a photo"])
    with torch.no_grad():
        answer = sdxl.predict(noisy, torch.tensor([5]), conditioning)
        for name in ("embeds", "pooled", "time_ids"):
            parts = {"embeds": conditioning.embeds, "pooled": conditioning.pooled, "time_ids": conditioning.time_ids}
            changed = type(conditioning)(**{**parts, name: parts[name] + 1})
            assert not torch.equal(sdxl.predict(noisy, torch.tensor([5]), changed), answer), name
