"""LoRA: shared start, parameter counts of the published models, adapter-off, several adapters with weights, exact unloading."""

import hashlib

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.testing import assert_close

from valign.checks import UserError
from valign.interfaces import SamplingConfig
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.lora import (
    adapted,
    adapter_off,
    adapter_weights,
    add_lora,
    attach_lora,
    load_adapter,
    unload_adapters,
)
from valign.models.files.adapter_files import LoraFactors, open_adapter, save_adapter

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD21 = {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(params=["tiny_sd", "tiny_sdxl"])
def model(request):
    return load_model(request.getfixturevalue(request.param))


@pytest.fixture
def answer():
    """What the U-Net says to one fixed question."""

    @torch.no_grad()
    def ask(model):
        noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return model.predict(noisy, torch.tensor([7]), model.encode_prompts(["a red man"]))

    return ask


def random_adapter(folder, model, seed, rank=2, modules=None):
    """A saved adapter that changes every attention (or ``modules``) at random."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, layer in model.denoiser.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")) if modules is None else name in modules:
            out, into = layer.weight.shape
            down, up = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
            factors[name] = LoraFactors(0.1 * down, 0.1 * up, 0.5)
    save_adapter(folder, factors, metadata={})
    return folder


@pytest.mark.parametrize(
    ("config", "parameters", "linears"),
    [(SD15, 797_184, 128), (SD21, 829_952, 128), (SDXL, 5_806_080, 560)],
    ids=["sd15", "sd21", "sdxl"],
)
def test_parameter_counts_of_the_published_models(config, parameters, linears):  # rank 4; counted for AlignGuard by hand
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    unet.requires_grad_(False)
    assert len(add_lora(unet, rank=4)) == linears
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == parameters


def test_a_fresh_lora_changes_nothing_and_alone_is_trainable(model, answer):
    base = answer(model)
    modules = attach_lora(model, rank=4, seed=1)
    assert torch.equal(answer(model), base)
    assert modules == sorted(modules)
    trainable = {name for name, p in model.denoiser.named_parameters() if p.requires_grad}
    assert trainable == {f"{m}.lora_{part}.expert.weight" for m in modules for part in "AB"}
    assert all(p.dtype == torch.float32 for p in model.denoiser.parameters() if p.requires_grad)


def test_experts_of_one_seed_share_their_start(tiny_sd):
    starts = []
    for rank, name, seed in [(4, "violence", 1), (4, "hate", 1), (4, "hate", 2)]:
        model = load_model(tiny_sd)
        attach_lora(model, rank=rank, name=name, seed=seed)
        starts.append({module: layer.lora_A[name].weight for module, layer in adapted(model.denoiser, name).items()})
    assert all(torch.equal(starts[0][module], starts[1][module]) for module in starts[0])
    assert not any(torch.equal(starts[0][module], starts[2][module]) for module in starts[0])


def test_the_start_is_gaussian_with_one_over_rank(tiny_sd):
    model = load_model(tiny_sd)
    attach_lora(model, rank=8, seed=0)
    layers = adapted(model.denoiser, "expert")
    values = torch.cat([layer.lora_A["expert"].weight.flatten() for layer in layers.values()])
    assert values.mean().abs() < 0.005
    assert_close(values.std(), torch.tensor(1 / 8), rtol=0.02, atol=0)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    seed = int.from_bytes(hashlib.sha256(f"0:{name}".encode()).digest()[:8]) >> 1  # documented, so that others can remake it
    weight = layers[name].lora_A["expert"].weight
    assert torch.equal(weight, torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) / 8)


def test_half_precision_base_gets_a_float32_lora(tiny_sd, answer):
    model = load_model(tiny_sd, dtype="bfloat16")
    base = answer(model)
    attach_lora(model, rank=2, alpha=4.0)
    assert {p.dtype for p in model.denoiser.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(answer(model), base)
    assert answer(model).dtype == torch.bfloat16
    assert next(iter(adapted(model.denoiser, "expert").values())).scaling["expert"] == 2.0


def test_adapter_off_is_the_base_model_and_restores_everything(model, answer):
    base = answer(model)
    attach_lora(model, rank=2)
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.denoiser.parameters() if p.requires_grad):
            parameter.add_(0.1)
            parameter.requires_grad_(index % 3 > 0)  # a method may freeze some factors
    changed = answer(model)
    weights = {name: (p.clone(), p.requires_grad) for name, p in model.denoiser.named_parameters()}
    with adapter_off(model):
        assert torch.equal(answer(model), base)
        with adapter_off(model):
            pass
        assert torch.equal(answer(model), base)
    with pytest.raises(KeyError), adapter_off(model):
        raise KeyError
    assert not torch.equal(changed, base)
    assert torch.equal(answer(model), changed)
    for name, parameter in model.denoiser.named_parameters():
        assert torch.equal(parameter, weights[name][0])
        assert parameter.requires_grad == weights[name][1]


def test_adapter_off_needs_an_adapter(tiny_sd):
    with pytest.raises(ValueError, match="adapter_off needs a model with an adapter, got none"), adapter_off(load_model(tiny_sd)):
        pass


def test_loaded_adapters_add_up_and_unload_without_a_trace(model, answer, tmp_path):
    base, weights = answer(model), {name: p.clone() for name, p in model.denoiser.state_dict().items()}
    fingerprint = model.fingerprint()
    one, two = random_adapter(tmp_path / "one", model, 1), random_adapter(tmp_path / "two", model, 2, rank=3)
    load_adapter(model, one, name="one", weight=0.5)
    load_adapter(model, two, name="self-harm", weight=-1.0)
    both = answer(model)
    assert adapter_weights(model) == {"one": 0.5, "self-harm": -1.0}
    assert model.fingerprint() == fingerprint
    assert not any(p.requires_grad for p in model.denoiser.parameters())
    unload_adapters(model)
    assert torch.equal(answer(model), base)
    assert model.denoiser.state_dict().keys() == weights.keys()
    assert all(torch.equal(p, weights[name]) for name, p in model.denoiser.state_dict().items())
    with torch.no_grad():  # the slow, obvious way: add the dense deltas to the weights
        for folder, weight in ((one, 0.5), (two, -1.0)):
            for module, factors in open_adapter(folder).items():
                model.denoiser.get_submodule(module).weight += weight * factors.delta()
    assert_close(both, answer(model), rtol=1e-3, atol=1e-4)


def test_an_adapter_may_have_other_ranks_and_few_modules(model, answer, tmp_path):
    modules = [name for name, _ in model.denoiser.named_modules() if name.endswith("attn2.to_k")][:2]
    load_adapter(model, random_adapter(tmp_path / "few", model, 1, rank=1, modules=modules[:1]), name="few")
    load_adapter(model, random_adapter(tmp_path / "more", model, 1, rank=5, modules=modules), name="more")
    assert {m: len(layer.r) for m, layer in adapted(model.denoiser, "more").items()} == {modules[0]: 2, modules[1]: 1}
    model.generate(["a"], seeds=[0], sampling=SamplingConfig(steps=1))


def test_a_loaded_adapter_can_be_switched_off(model, answer, tmp_path):
    base = answer(model)
    load_adapter(model, random_adapter(tmp_path / "one", model, 1), name="one")
    with adapter_off(model):
        assert torch.equal(answer(model), base)
    assert not any(p.requires_grad for p in model.denoiser.parameters())


def test_refuses_what_does_not_fit_and_stays_as_it_was(tiny_sd, tiny_sdxl, tmp_path, answer):
    sd, sdxl = load_model(tiny_sd), load_model(tiny_sdxl)
    base = answer(sd)
    with pytest.raises(UserError, match=r"must fit the model, got \d+ of \d+ modules that it does not have, such as"):
        load_adapter(sd, random_adapter(tmp_path / "xl", sdxl, 0), name="xl")
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    save_adapter(tmp_path / "wide", {name: LoraFactors(torch.ones(1, 7), torch.ones(64, 1), 1.0)}, metadata={})
    with pytest.raises(UserError, match=r"got mid_block.* of \(64, 7\) where the model has \(64, 32\)"):
        load_adapter(sd, tmp_path / "wide", name="wide")
    assert torch.equal(answer(sd), base)
    good = random_adapter(tmp_path / "good", sd, 0)
    load_adapter(sd, good, name="good")
    for bad in ("good", "a.b", ""):
        with pytest.raises(UserError, match=r"load_adapter\.name must be a new name"):
            load_adapter(sd, good, name=bad)
    with pytest.raises(ValueError, match=r"load_adapter\.weight must be in"):
        load_adapter(sd, good, name="other", weight=float("nan"))
    with pytest.raises(ValueError, match="A new adapter needs a bare denoiser, got one with good"):
        attach_lora(sd, rank=1)
    unload_adapters(sd)
    attach_lora(sd, rank=1)
    with pytest.raises(ValueError, match="load_adapter needs a frozen model, got one in training"):
        load_adapter(sd, good, name="good")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"attach_lora\.rank must be in \[1, inf\), got 0"),
        ({"rank": 2, "alpha": 0.0}, r"attach_lora\.alpha must be in \(0, inf\), got 0"),
        ({"rank": 2, "targets": ("to_nowhere",)}, r"attach_lora\.targets must name modules of the denoiser, got to_nowhere"),
    ],
)
def test_refuses_bad_options(tiny_sd, options, message):
    model = load_model(tiny_sd)
    with pytest.raises(ValueError, match=message):
        attach_lora(model, **options)
    assert not getattr(model.denoiser, "peft_config", None)


def test_the_base_gets_no_gradient(model):
    attach_lora(model, rank=2)
    answer = model.predict(torch.ones(1, 4, 8, 8), torch.tensor([3]), model.encode_prompts(["a"]))
    answer.square().sum().backward()
    for name, parameter in model.denoiser.named_parameters():
        if "lora_A" in name:
            assert not parameter.grad.any()  # B is zero, so the start of A does not matter yet
        elif "lora_B" in name:
            assert parameter.grad.any()
        else:
            assert parameter.grad is None
