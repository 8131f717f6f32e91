"""What every adaptive method in the table promises: the base at the start, plain LoRA at the end, and what it refuses."""

import warnings

import pytest
import torch
from networks import Attention, inputs, with_lora
from torch import nn
from torch.testing import assert_close

from valign.adapters import ADAPTERS, CoDyRA, DiffoRA, IncreLoRA, SoRA, export_lora
from valign.adapters.factors import lora_layers
from valign.methods import declared_methods
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.lora import attach_lora, unload_adapters
from valign.models.files.adapter_files import save_adapter

METHODS = {"codyra": CoDyRA, "diffora": DiffoRA, "increlora": IncreLoRA, "sora": SoRA}
OPTIONS = {
    "codyra": {"steps": 2, "levels": 1},
    "diffora": {"steps": 2, "lr": 1e-2, "warmup": 0.0},
    "increlora": {"init_warmup": 0, "interval": 1},
    "sora": {"threshold": 0.2},
}


def test_every_adaptive_expert_is_tried():
    assert sorted(METHODS) == sorted(name for name, options in ADAPTERS.items() if options.expert and options.adaptive)


def make(method, model):
    drawn = {} if method == "diffora" else {"generator": torch.Generator().manual_seed(0)}
    return METHODS[method](model, **OPTIONS[method], **drawn)


def drive(method, unet, loss):
    """Two steps of a method as its page says."""
    made = make(method, unet)
    if method == "diffora":
        for _ in range(2):
            made.step(loss, loss)
        return
    if method == "sora":
        optimizers = [torch.optim.AdamW(made.weights(), lr=1e-2), made.gate_optimizer(lr=1e-2)]
    else:
        optimizers = [torch.optim.AdamW(made.parameters(), lr=1e-2)]
        made.watch(optimizers[0])
    for _ in range(2):
        loss().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("method", METHODS)
def test_a_unet_keeps_its_base_and_loads_the_export(method, tiny_sd, tmp_path):
    sd = load_model(tiny_sd)
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def ask(model=sd):
        return model.predict(noisy, torch.tensor([7]), model.encode_prompts(["a red man"]))

    with torch.no_grad():
        before = ask()
    attach_lora(sd, rank=2 if method != "increlora" else 1)
    drive(method, sd.denoiser, lambda: ask().square().sum())
    with torch.no_grad():
        answer = ask()
    save_adapter(tmp_path / "adapter", export_lora(sd.denoiser), metadata={})
    unload_adapters(sd)
    clean = load_model(tiny_sd)
    with torch.no_grad():
        assert torch.equal(ask(), before)
        clean.pipe.load_lora_weights(str(tmp_path / "adapter"))
        assert_close(ask(clean), answer, rtol=1e-3, atol=1e-4)
    assert not torch.equal(answer, before)


@pytest.mark.parametrize("method", METHODS)
def test_the_method_is_declared(method):
    assert method in {declared.slug for declared in declared_methods() if declared.room == "adapters"}


def moved(method, dtype=torch.float32):
    """A method on a small network, away from its start."""
    model = with_lora(Attention(dtype=dtype), rank=1)
    made = make(method, model)
    with torch.no_grad():
        for layer in lora_layers(model, "default").values():
            layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
            if method == "increlora":
                layer.lora_blocks["default"].first_gain.fill_(0.7)
    return model, made


@pytest.mark.parametrize("method", METHODS)
def test_float64_stays_float64(method):
    model, _ = moved(method, torch.float64)
    x = inputs(dtype=torch.float64)
    for name, lora in export_lora(model).items():
        layer = lora_layers(model, "default")[name]
        expected = layer.base_layer(x) + lora.scale * (x @ lora.down.T) @ lora.up.T
        assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_merging_twice_merges_once_and_comes_off_again(method):
    model, _ = moved(method)
    model.eval()
    answer = model(inputs())
    model.merge_adapter()
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert_close(model(inputs()), answer, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert_close(model(inputs()), answer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (Attention, {"rank": 9}, r"\.rank must be in \[1, 8\] for to_v, got 9\. The weight is \(8, 12\)"),
        (lambda: nn.ModuleDict({"to_q": nn.Embedding(5, 4)}), {"rank": 1, "targets": ["to_q"]}, "linear layers only, got to_q"),
        (lambda: nn.ModuleDict({"to_q": nn.Conv2d(4, 4, 3)}), {"rank": 1, "targets": ["to_q"]}, "linear layers only, got to_q"),
        (Attention, {"use_dora": True}, "must start from a plain new LoRA, got to_k which is Dora"),
        (Attention, {"init_lora_weights": "olora"}, "must start from init_lora_weights=True, got 'olora'"),
    ],
)
def test_a_layer_that_cannot_work_is_named(method, network, options, message):
    model = with_lora(network(), **options)
    with pytest.raises(ValueError, match=rf"{METHODS[method].__name__}.*{message}"):
        make(method, model)


@pytest.mark.parametrize("method", ["codyra", "increlora", "sora"])
def test_small_numbers_keep_float32_or_are_refused(method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CoDyRA's, on merging
        model = with_lora(Attention(dtype=torch.bfloat16), rank=1)
        made = make(method, model)
    small = [p for name, p in model.named_parameters() if "gate" in name or "gain" in name]
    assert len(small) >= 3
    assert all(p.dtype == torch.float32 for p in small)
    model.half()
    step = {"codyra": "after_step", "increlora": "before_step", "sora": "shut"}[method]
    with pytest.raises(TypeError, match=r"must stay in float32, got torch\.float16\. Change the model's dtype before"):
        getattr(made, step)()
