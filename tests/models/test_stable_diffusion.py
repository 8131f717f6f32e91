"""Stable Diffusion 1 and 2 against diffusers' own pipeline."""

import pytest
import torch
from torch.testing import assert_close

from valign.interfaces import SamplingConfig
from valign.models.diffusion.loading import load_model
from valign.models.images import pil_to_tensor

PROMPTS = ["a photo of a red man", "Ein Café, 猫 & \N{PILE OF POO}!", "the"]


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return load_model(tiny_sd)


@pytest.fixture(scope="module")
def sd_v(tiny_sd_v):
    return load_model(tiny_sd_v)


def test_what_it_says_of_itself(sd, sd_v):
    assert (sd.family, sd.schedule.kind, sd_v.schedule.kind) == ("stable-diffusion", "epsilon", "velocity")
    assert (sd.latent_shape, sd.image_size, sd.schedule.num_timesteps) == ((4, 8, 8), 64, 1000)
    assert (sd.device.type, sd.dtype) == ("cpu", torch.float32)
    assert not any(p.requires_grad for part in (sd.denoiser, sd.pipe.vae, sd.pipe.text_encoder) for p in part.parameters())


def test_prompts_are_encoded_as_diffusers_does_bit_for_bit(sd):
    cond, uncond = sd.pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    assert torch.equal(sd.encode_prompts(PROMPTS).embeds, cond)
    assert torch.equal(sd.encode_prompts([""] * 3).embeds, uncond)


def test_long_prompts_are_cut_without_telling_the_log(sd, caplog, capsys):
    long = "horrid " * 100
    assert torch.equal(sd.encode_prompts([long]).embeds, sd.encode_prompts([long + " more"]).embeds)
    assert "horrid" not in caplog.text + "".join(capsys.readouterr())


@pytest.mark.parametrize("prompts", ["one text", []])
def test_refuses_prompts_that_are_not_a_list(sd, prompts):
    with pytest.raises(ValueError, match=r"encode_prompts\.prompts must be a list of at least one text"):
        sd.encode_prompts(prompts)


def test_latents_are_the_posterior_in_units_of_the_unet(sd):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = sd.encode_images(images)
    with torch.no_grad():
        posterior = sd.pipe.vae.encode(images).latent_dist
    assert torch.equal(latents.mean, posterior.mean * 0.18215)
    assert torch.equal(latents.std, posterior.std * 0.18215)
    noise = torch.randn(latents.mean.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(latents.sample(noise), latents.mean + latents.std * noise)


def test_latent_statistics_of_the_autoencoder_are_undone(tiny_sd):
    model = load_model(tiny_sd)
    model.pipe.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    images = torch.zeros(1, 3, 64, 64)
    plain = load_model(tiny_sd).encode_images(images)
    mean, std = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1), torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    shifted = model.encode_images(images)
    assert_close(shifted.mean, (plain.mean / 0.18215 - mean) * 0.18215 / std)
    with torch.no_grad():
        assert_close(model.decode_latents(shifted.mean), load_model(tiny_sd).decode_latents(plain.mean), rtol=1e-4, atol=1e-5)


def test_latent_statistics_follow_the_model_to_another_device(tiny_sd):
    model = load_model(tiny_sd)
    model.pipe.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    latents = model.encode_images(torch.zeros(1, 3, 64, 64)).mean
    model.to("meta")  # a device without values: a tensor left on the CPU cannot be combined with what lies there
    assert model.device.type == "meta"
    assert model.decode_latents(latents.to("meta")).shape == (1, 3, 64, 64)
    assert model.encode_images(torch.zeros(1, 3, 64, 64)).mean.device.type == "meta"


def test_what_is_left_of_an_image_at_a_timestep(sd):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    timesteps = torch.tensor([0, 250, 999])
    assert_close(sd.schedule.alpha_bar(timesteps).double(), (1 - betas).cumprod(0)[timesteps], rtol=1e-4, atol=1e-6)


def test_noise_and_target_follow_the_forward_process(sd, sd_v):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([0, 500, 999])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # "scaled_linear"
    a = (1 - betas).cumprod(0)[timesteps].view(3, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    assert_close(sd.schedule.add_noise(latents, noise, timesteps).double(), noisy, rtol=1e-4, atol=1e-5)
    assert torch.equal(sd.schedule.target(latents, noise, timesteps), noise)
    velocity = a.sqrt() * noise - (1 - a).sqrt() * latents
    assert_close(sd_v.schedule.target(latents, noise, timesteps).double(), velocity, rtol=1e-4, atol=1e-5)


def test_noise_is_float32_for_half_precision_latents(sd):
    latents = torch.ones(1, 4, 8, 8, dtype=torch.bfloat16)
    assert sd.schedule.add_noise(latents, latents, torch.tensor([10])).dtype == torch.float32
    assert sd.schedule.target(latents, latents, torch.tensor([10])).dtype == torch.float32


def test_half_precision_keeps_the_autoencoder_in_float32(tiny_sd):
    model = load_model(tiny_sd, dtype="bfloat16")
    assert (model.dtype, model.pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    assert model.encode_prompts(["a"]).embeds.dtype == torch.bfloat16
    assert model.generate(["a"], seeds=[0], sampling=SamplingConfig(steps=2))[0].size == (64, 64)


def test_gradients_reach_the_unet_after_sampling(tiny_sd):
    model = load_model(tiny_sd)
    model.generate(["a"], seeds=[0], sampling=SamplingConfig(steps=1))
    model.denoiser.requires_grad_(True)
    noisy = model.encode_images(pil_to_tensor(model.generate(["a"], seeds=[0], sampling=SamplingConfig(steps=1)), 64)).mean
    model.predict(noisy, torch.tensor([3]), model.encode_prompts(["a"])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.denoiser.parameters())
