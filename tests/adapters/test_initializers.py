"""What every initializer in the table promises."""

import pytest
import torch
from networks import Attention, inputs, train, trainable, with_lora
from peft import PeftModel
from torch import nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2Model

from valign.adapters import INITIALIZERS, adapter_state, export_lora, initialize, save_peft_lora
from valign.adapters.factors import lora_layers
from valign.methods import declared_methods

OPTIONS = {
    "lora-sb": {
        "samples": [inputs(seed=4)],
        "loss": lambda model, x: model(x).square().sum(),
        "learning_rate": 1e-3,
        "count": 1,
        "allow_scale": True,
    }
}


@pytest.fixture(params=INITIALIZERS)
def method(request):
    return request.param


def options_of(method, model):
    """The options that a method needs; importances are seeded numbers of every adapted weight's shape."""
    if method != "fila":
        return OPTIONS.get(method, {})
    random = torch.Generator().manual_seed(8)
    layers = lora_layers(model, next(iter(model.peft_config)))
    return {"importances": {name: torch.rand(one.out_features, one.in_features, generator=random) for name, one in layers.items()}}


def start(method, model=None):
    model = model if model is not None else with_lora()
    return model, initialize(model, method, **options_of(method, model))


def test_the_method_is_declared(method):
    assert method in {declared.slug for declared in declared_methods() if declared.room == "adapters"}


def test_the_report_is_true(method):
    base = Attention()
    before, weight = base(inputs()), base.to_q.weight.clone()
    model, report = start(method, with_lora(base))
    kept = torch.allclose(model(inputs()), before, rtol=0, atol=1e-5)
    assert (report.method, report.adapter, sorted(report.roles)) == (method, "default", ["to_k", "to_q", "to_v"])
    assert kept is report.keeps_function
    assert torch.equal(base.to_q.base_layer.weight, weight) is report.keeps_base
    assert report.trainable == sum(p.numel() for p in trainable(model).values())


def test_the_same_start_gives_the_same_bytes(method):
    states = [adapter_state(start(method)[0], "default") for _ in range(2)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_global_random_state_is_not_touched(method):
    model = with_lora()
    before = torch.get_rng_state()
    start(method, model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trained_adapter_is_plain_lora_on_a_clean_base(method, tmp_path):
    model, _ = start(method)
    train(model)
    model.eval()
    again = PeftModel.from_pretrained(Attention(), str(save_peft_lora(tmp_path / "lora", export_lora(model))))
    assert_close(again(inputs()), model(inputs()), rtol=0, atol=5e-6)


def test_the_saved_state_goes_on_to_the_same_bytes(method):
    model, _ = start(method)
    train(model, steps=2)
    other, _ = start(method)
    for name, tensor in adapter_state(other, "default").items():
        tensor.data.copy_(adapter_state(model, "default")[name])
    for network in (model, other):
        train(network, steps=2)
    assert torch.equal(model(inputs()), other(inputs()))


def test_ranks_and_scales_of_single_modules_are_the_layers_own(method, tmp_path):
    model, report = start(method, with_lora(rank_pattern={"to_q": 2}, alpha_pattern={"to_v": 5}))
    assert {name: layer.r["default"] for name, layer in lora_layers(model, "default").items()} == {"to_k": 3, "to_q": 2, "to_v": 3}
    assert torch.allclose(model(inputs()), Attention()(inputs()), rtol=0, atol=1e-5) is report.keeps_function
    train(model)
    again = PeftModel.from_pretrained(Attention(), str(save_peft_lora(tmp_path / "lora", export_lora(model))))
    assert_close(again(inputs()), model(inputs()), rtol=0, atol=5e-6)


def test_fused_attention_is_refused(method):
    model = with_lora(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "to_v": nn.Linear(8, 8)}), targets=("attn", "to_v"))
    with pytest.raises(ValueError, match=r"must have linear layers only, got attn, a MultiheadAttention\. .* unfuse it"):
        start(method, model)


def test_a_weight_that_is_not_the_models_own_is_refused_and_left(method):
    merged = with_lora()
    merged.merge_adapter()
    residual = with_lora()
    initialize(residual, "ailora")
    residual.add_adapter("other", residual.peft_config["default"])
    for model, adapter, message in (
        (merged, "default", r"must read the base weight, got to_k with default merged\. Call unmerge_adapter first"),
        (residual, "other", r"must read the base weight, got to_q which holds the residual of adapter 'default'\. Load the base"),
    ):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            initialize(model, method, adapter=adapter, **options_of(method, model))
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    preserved = with_lora()
    initialize(preserved, "ailora", preserve_base=True)
    preserved.add_adapter("other", preserved.peft_config["default"])
    initialize(preserved, method, adapter="other", **options_of(method, preserved))  # its base is the model's own


def test_a_second_adapter_can_come_and_go(method):
    model, _ = start(method)
    answer = model(inputs())
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    model.set_adapter("default")
    assert torch.equal(model(inputs()), answer)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert not lora_layers(model, "default")
    assert not any(hasattr(layer, "lora_method") and layer.lora_method for layer in lora_layers(model, "other").values())


def test_transposed_weights_of_gpt2(method, tmp_path):
    if method == "ailora":
        pytest.skip("its projections are fused: a refusal, see test_ailora")
    config = GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=9, n_positions=8)
    torch.manual_seed(0)
    base = GPT2Model(config).eval()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    tokens = torch.arange(6)[None]
    model = with_lora(base, targets=("c_attn",), fan_in_fan_out=True)
    options = {"samples": [tokens], "loss": lambda m, x: m(x).last_hidden_state.pow(3).sum()} if method in OPTIONS else {}
    initialize(model, method, **{**options_of(method, model), **options})
    optimizer = torch.optim.Adam(trainable(model).values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens).last_hidden_state.pow(3).sum().backward()
        optimizer.step()
    answer = model.eval()(tokens).last_hidden_state
    clean = GPT2Model(config).eval()
    before = clean.load_state_dict(state) and clean(tokens).last_hidden_state
    with torch.no_grad():
        for name, lora in export_lora(model).items():
            clean.get_submodule(name).weight += lora.delta().T
    assert_close(clean(tokens).last_hidden_state, answer, rtol=0, atol=5e-6)
    assert (before - answer).abs().max() > 1e-3
    assert_close(model.merge_and_unload()(tokens).last_hidden_state, answer, rtol=0, atol=5e-6)


def test_a_unet_loads_the_exported_file(method, tiny_sd, tmp_path):
    from valign.models.diffusion.loading import load_model
    from valign.models.diffusion.lora import ATTENTION, attach_lora
    from valign.models.files.adapter_files import save_adapter

    sd = load_model(tiny_sd)
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def ask(model):
        return model.predict(noisy, torch.tensor([7]), model.encode_prompts(["a red man"]))

    attach_lora(sd, rank=2, targets=ATTENTION)
    options = {"samples": [0], "loss": lambda *_: ask(sd).square().sum()} if method in OPTIONS else {}
    initialize(sd.denoiser, method, **{**options_of(method, sd.denoiser), **options})
    optimizer = torch.optim.Adam([p for p in sd.denoiser.parameters() if p.requires_grad], lr=1e-2)
    ask(sd).pow(2).sum().backward()
    optimizer.step()
    with torch.no_grad():
        answer = ask(sd)
    save_adapter(tmp_path / "adapter", export_lora(sd.denoiser), metadata={})
    clean = load_model(tiny_sd)
    with torch.no_grad():
        before = ask(clean)
        clean.pipe.load_lora_weights(str(tmp_path / "adapter"))  # diffusers' own loader
        assert_close(ask(clean), answer, rtol=1e-3, atol=1e-4)
    assert (before - answer).abs().max() > 1e-2
