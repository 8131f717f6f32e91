"""Networks come when they are needed and go when they are not, and nothing that they answer changes."""

import pytest
import torch
from torch.testing import assert_close

from valign.checks import UserError
from valign.interfaces import SamplingConfig
from valign.memory import MemoryConfig
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.lora import attach_lora, unload_adapters
from valign.models.diffusion.network_pool import NetworkPool


def loaded(model):
    """Names of the networks whose weights are in memory."""
    parts = {name: getattr(model.pipe, name) for name in model.networks}
    return {name for name, part in parts.items() if not any(p.is_meta for p in part.parameters())}


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sdxl"])
def both(request):
    folder = request.getfixturevalue(request.param)
    return load_model(folder, device="cpu"), load_model(folder, device="cpu", memory=MemoryConfig(phased=True))


def test_a_phased_model_holds_one_group_of_networks_at_a_time(both):
    whole, phased = both
    texts = {name for name in phased.networks if name.startswith("text_encoder")}
    assert loaded(whole) == set(whole.networks)
    assert loaded(phased) == set()
    known = phased.encode_prompts(["a red cat", ""])
    assert loaded(phased) == texts
    assert torch.equal(known.embeds, whole.encode_prompts(["a red cat", ""]).embeds)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(phased.encode_images(pixels).mean, whole.encode_images(pixels).mean)
    assert loaded(phased) == {"vae"}
    noisy = torch.ones(2, *phased.latent_shape)
    assert torch.equal(phased.predict(noisy, torch.tensor(5), known), whole.predict(noisy, torch.tensor(5), known))
    assert loaded(phased) == {"unet"}
    assert phased.device == torch.device("cpu")


def test_what_generates_images_has_all_networks_together(both):
    whole, phased = both
    sampling = SamplingConfig(steps=2, batch_size=1)
    images = [model.generate(["a cat", "a dog"], sampling=sampling) for model in (whole, phased)]
    assert [image.tobytes() for image in images[0]] == [image.tobytes() for image in images[1]]
    assert loaded(phased) == set(phased.networks)


def test_a_denoiser_under_an_adapter_stays(tiny_sd):
    model = load_model(tiny_sd, device="cpu", memory=MemoryConfig(phased=True))
    attach_lora(model, rank=2)
    model.encode_prompts(["a cat"])
    assert "unet" in loaded(model)
    unload_adapters(model)
    model.encode_prompts(["a cat"])
    assert loaded(model) == {"text_encoder"}


def test_the_autoencoder_works_in_slices_with_the_same_result(tiny_sd):
    whole, sliced = (load_model(tiny_sd, device="cpu", memory=MemoryConfig(vae_slice=size)) for size in (5, 2))
    calls = []
    sliced.pipe.vae.decoder.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    latents = torch.randn(5, *whole.latent_shape, generator=torch.Generator().manual_seed(0))
    assert_close(sliced.decode_latents(latents), whole.decode_latents(latents))
    assert calls == [2, 2, 1]
    pixels = torch.rand(3, 3, 64, 64)
    assert_close(sliced.encode_images(pixels).mean, whole.encode_images(pixels).mean)


def test_the_autoencoder_has_a_precision_of_its_own(tiny_sd):
    model = load_model(tiny_sd, device="cpu", memory=MemoryConfig(precision="bfloat16"))
    assert (model.dtype, model.pipe.vae.dtype, model.pipe.text_encoder.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    half = load_model(tiny_sd, device="cpu", memory=MemoryConfig(vae_precision="bfloat16"))
    assert (half.dtype, half.pipe.vae.dtype) == (torch.float32, torch.bfloat16)


def test_offloading_needs_a_device_to_offload_from(tiny_sd):
    with pytest.raises(UserError, match=r"memory\.offload moves networks between a device and main memory, got device cpu"):
        load_model(tiny_sd, device="cpu", memory=MemoryConfig(offload=True))


def test_offloaded_networks_visit_the_device_one_after_another():
    """The meta device stands in for a card."""

    class Pipe:
        text_encoder, vae, unet = (torch.nn.Linear(2, 2) for _ in range(3))

    pipe = Pipe()
    groups = {"text": ("text_encoder",), "vae": ("vae",), "denoiser": ("unet",)}
    pool = NetworkPool(pipe, torch.device("meta"), groups, mode="offload")
    pool.need("text")
    assert [part.weight.is_meta for part in (pipe.text_encoder, pipe.vae, pipe.unet)] == [True, False, False]
