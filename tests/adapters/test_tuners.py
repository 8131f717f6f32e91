"""The contract: what every row of `TUNERS` does on a transformers model and on a diffusers U-Net."""

import copy
import math
import warnings

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import set_peft_model_state_dict
from torch import nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model
from tuner_models import TARGETS, ask, build, shake, weights

from valign.adapters import TUNERS, register_tuners
from valign.adapters.tuner import TunerConfig, TunerType, register_tuner
from valign.adapters.tuner_layer import TunerLayer, tuner_layers

OPTIONS = {
    "clip-svd": {},
    "loca": {"n_coefficients": 9},
    "loldu": {"r": 4},
    "nola": {"r": 2, "num_basis_a": 5, "num_basis_b": 7},
    "randlora": {"r": 4},
    "svfit": {"r": 3},
}
COUNTS = {  # trained numbers of a weight with smaller side d, as the papers give them
    "clip-svd": lambda d: d,
    "loca": lambda d: 9,
    "loldu": lambda d: 4,
    "nola": lambda d: 5 + 7,
    "randlora": lambda d: math.ceil(d / 4) * (4 + d),
    "svfit": lambda d: 3,
}
OURS = sorted(slug for slug, config in TUNERS.items() if issubclass(config, TunerConfig))
READ_BASE = ("clip-svd", "loldu", "svfit")

every_tuner = pytest.mark.parametrize("slug", sorted(TUNERS))
our_tuners = pytest.mark.parametrize("slug", OURS)
both_models = pytest.mark.parametrize("kind", ["text", "unet"])


def config(slug, targets=("q_proj", "fc1"), **options):
    return TUNERS[slug](target_modules=list(targets), **(OPTIONS[slug] | options))


def adapted(slug, kind, size=0.1):
    """A model with an adapter as after training."""
    model = get_peft_model(build(kind), config(slug, TARGETS[kind]))
    shake(model, size=size)
    return model


def test_every_tuner_is_tried():
    assert sorted(OPTIONS) == sorted(COUNTS) == sorted(TUNERS)


@every_tuner
@both_models
def test_step_0_keeps_the_function_bit_for_bit_and_counts_as_the_paper(slug, kind):
    base = build(kind)
    before, shapes = ask(base), weights(base, TARGETS[kind])
    model = get_peft_model(base, config(slug, TARGETS[kind]))
    assert torch.equal(ask(model), before)
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    assert sum(trained) == sum(COUNTS[slug](min(shape)) for shape in shapes)
    shake(model)
    assert (ask(model) - before).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(ask(model), before)


@every_tuner
@both_models
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_comes_back_bit_for_bit(slug, kind, low_cpu_mem_usage, tmp_path):
    model = adapted(slug, kind)
    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".safetensors"]
    loaded = PeftModel.from_pretrained(build(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(ask(loaded), ask(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@our_tuners
def test_a_file_holds_no_frozen_matrix(slug):
    state = get_peft_model_state_dict(adapted(slug, "text"))
    places = ("vtune_locations", "vtune_grid")  # LoCA's, [2, K]
    assert all(tensor.squeeze().ndim < 2 or name.endswith(places) for name, tensor in state.items())


@every_tuner
@both_models
def test_merging_and_unmerging(slug, kind):
    model = adapted(slug, kind, size=0.03)
    with model.disable_adapter():
        base = ask(model)
    adapter = ask(model)
    model.merge_adapter(safe_merge=True)
    assert_close(ask(model), adapter, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert_close(ask(model), adapter, atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        assert_close(ask(model), base, atol=1e-4, rtol=1e-4)
    bare = model.merge_and_unload()
    assert not any("vtune" in name or "randlora" in name for name, _ in bare.named_modules())
    assert_close(ask(bare), adapter, atol=1e-4, rtol=1e-4)


@our_tuners
def test_merging_twice_is_refused_and_changes_nothing(slug):
    model = adapted(slug, "text", size=0.03)
    model.merge_adapter()
    merged = ask(model)
    for names in (None, ["default"]):
        with pytest.raises(ValueError, match=r"must not all be merged already, got default\. Call unmerge_adapter first"):
            model.merge_adapter(adapter_names=names)
    with pytest.warns(UserWarning, match="already merged"):  # by layer, as diffusers' fuse_lora does: peft's harmless warning
        next(tuner_layers(model))[1].merge()
    assert torch.equal(ask(model), merged)
    with pytest.warns(UserWarning, match="already merged"):
        assert torch.equal(ask(model.merge_and_unload()), merged)


@our_tuners
def test_a_second_adapter_is_merged_on_top(slug):
    model = adapted(slug, "text", size=0.03)
    model.add_adapter("other", config(slug))
    model.set_adapter("other")
    shake(model, "other", size=0.03, seed=3)
    base = {name: layer.weight.clone() for name, layer in tuner_layers(model)}
    model.merge_adapter(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(adapter_names=["default", "other"])
    for name, layer in tuner_layers(model):
        both = layer.get_delta_weight("default") + layer.get_delta_weight("other")
        assert_close(layer.weight, base[name] + both)
    model.unmerge_adapter()
    for name, layer in tuner_layers(model):
        assert_close(layer.weight, base[name], atol=1e-6, rtol=1e-5)


@every_tuner
@both_models
def test_two_adapters_are_switched_and_deleted(slug, kind):
    model = adapted(slug, kind)
    first = ask(model)
    model.add_adapter("other", config(slug, TARGETS[kind]))
    assert torch.equal(ask(model), first)
    model.set_adapter("other")
    with model.disable_adapter():
        base = ask(model)
    assert torch.equal(ask(model), base)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".other" in name for name in trained)
    shake(model, "other", seed=3)
    assert (ask(model) - first).abs().max() > 1e-4
    model.set_adapter("default")
    assert torch.equal(ask(model), first)
    model.delete_adapter("other")
    assert torch.equal(ask(model), first)


@our_tuners
def test_two_adapters_at_once_add_up(slug):
    model = adapted(slug, "text")
    model.add_adapter("other", config(slug))
    model.set_adapter("other")
    shake(model, "other", seed=3)
    _, layer = next(tuner_layers(model))
    x = torch.randn(3, layer.fan_in, generator=torch.Generator().manual_seed(4))
    base = layer.base_layer(x)
    parts = [x @ layer.get_delta_weight(adapter).T for adapter in ("default", "other")]
    model.base_model.set_adapter(["default", "other"])
    assert_close(layer(x), base + parts[0] + parts[1], atol=1e-5, rtol=1e-5)


@every_tuner
def test_only_the_adapter_gets_gradients_also_with_checkpointing(slug):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(slug, "unet").train()
        if checkpointing:
            model.get_base_model().enable_gradient_checkpointing()
        ask(model).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
        assert sorted(gradients[-1]) == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        assert any(gradient.abs().max() > 0 for gradient in gradients[-1].values())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@our_tuners
def test_half_precision_base(slug):
    base = build("text").to(torch.bfloat16)
    before = ask(base)
    model = get_peft_model(base, config(slug), autocast_adapter_dtype=False)
    assert torch.equal(ask(model), before)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    shake(model)
    adapter = ask(model)
    assert adapter.dtype == torch.bfloat16
    model.half()  # what a pipeline does to a loaded adapter; places and seeds survive, the rest is rounded
    assert_close(ask(model).float(), adapter.float(), atol=0.1, rtol=0.1)


@our_tuners
def test_the_change_is_the_forward_pass_whatever_the_number_of_tokens(slug):
    """Few tokens go through the factors, many through the product; both are `get_delta_weight`."""
    model = adapted(slug, "text")
    for _, layer in tuner_layers(model):
        x = torch.randn(400, layer.fan_in, generator=torch.Generator().manual_seed(4))
        delta = layer.get_delta_weight("default")
        for rows in (x[:1], x, x.view(2, 200, -1)):
            assert_close(layer(rows) - layer.base_layer(rows), rows @ delta.T, atol=1e-5, rtol=1e-4)


@our_tuners
def test_float64_layers_have_float64_adapters(slug):
    layer = nn.ModuleDict({"lin": nn.Linear(6, 5)}).double()
    model = inject_adapter_in_model(config(slug, ["lin"]), layer)
    shake(model)
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    change = model["lin"](x) - model["lin"].base_layer(x)
    assert_close(change, x @ model["lin"].get_delta_weight("default").T, atol=1e-13, rtol=1e-12)


@our_tuners
def test_conv1d_of_transformers_is_a_transposed_linear(slug):
    torch.manual_seed(0)
    gpt = GPT2Model(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
    model = get_peft_model(gpt, config(slug, ["c_attn"]))
    shake(model)
    adapter = model(torch.arange(5)[None]).last_hidden_state
    _, layer = next(tuner_layers(model))
    assert (layer.fan_out, layer.fan_in) == (24, 8)
    assert layer.get_delta_weight("default").shape == (8, 24)
    assert_close(model.merge_and_unload()(torch.arange(5)[None]).last_hidden_state, adapter, atol=1e-5, rtol=1e-4)


@our_tuners
def test_peft_converts_it_to_lora(slug):
    model = adapted(slug, "text")
    adapter = ask(model)
    lora, state = convert_to_lora(model, rank=16)
    plain = get_peft_model(build("text"), lora)
    set_peft_model_state_dict(plain, state)
    assert_close(ask(plain), adapter, atol=1e-4, rtol=1e-4)


@our_tuners
def test_diffusers_adds_scales_fuses_and_loads_it(slug):
    unet = build("unet")
    base = ask(unet)
    unet.add_adapter(config(slug, TARGETS["unet"]), adapter_name="expert")
    shake(unet, "expert")
    full = ask(unet)
    unet.set_adapters(["expert"], weights=[0.0])
    assert torch.equal(ask(unet), base)
    unet.set_adapters(["expert"], weights=[1.0])
    assert torch.equal(ask(unet), full)
    _, layer = next(tuner_layers(unet))
    delta = layer.get_delta_weight("expert")
    layer.scale_layer(0.5)
    assert_close(layer.get_delta_weight("expert"), 0.5 * delta)
    layer.unscale_layer(0.5)
    assert_close(layer.get_delta_weight("expert"), delta)
    layer.scale_layer(3.0)
    layer.unscale_layer()
    assert torch.equal(layer.get_delta_weight("expert"), delta)

    other = build("unet")  # the way to load it where diffusers only knows LoRA
    inject_adapter_in_model(config(slug, TARGETS["unet"]), other, adapter_name="twin")
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(unet, adapter_name="expert"), adapter_name="twin")
    assert not result.unexpected_keys
    assert torch.equal(ask(other), full)

    unet.fuse_lora()
    assert_close(ask(unet), full, atol=1e-4, rtol=1e-4)
    unet.unfuse_lora()
    assert_close(ask(unet), full, atol=1e-4, rtol=1e-4)
    unet.disable_adapters()
    assert_close(ask(unet), base, atol=1e-4, rtol=1e-4)


@our_tuners
def test_transformers_loads_it(slug, tmp_path):
    model = adapted(slug, "text")
    model.save_pretrained(tmp_path)
    plain = build("text")
    plain.load_adapter(str(tmp_path))
    assert torch.equal(ask(plain), ask(model))


@our_tuners
@pytest.mark.parametrize(
    ("target", "error", "match"),
    [
        ("embed", TypeError, r"target_modules must name nn\.Linear .*got embed, a Embedding"),
        ("conv", TypeError, r"target_modules must name nn\.Linear .*got conv, a Conv2d"),
        ("mha.out_proj", TypeError, r"got mha\.out_proj, a NonDynamicallyQuantizableLinear"),
        ("mha", TypeError, r"got mha, a MultiheadAttention"),
        ("int8", TypeError, r"int8\.weight must be float16, bfloat16, float32 or float64, got torch\.int8"),
        ("nowhere", ValueError, r"Target modules .* not found in the base model.* target_modules can name fine\."),
    ],
)
def test_layers_that_it_cannot_sit_on_are_refused_and_the_model_is_as_before(slug, target, error, match):
    model = nn.Sequential()
    model.add_module("fine", nn.Linear(6, 6))
    model.add_module("embed", nn.Embedding(4, 6))
    model.add_module("conv", nn.Conv2d(2, 4, 3))
    model.add_module("mha", nn.MultiheadAttention(6, 2))
    model.add_module("int8", nn.Linear(6, 6))
    model.int8.weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.int8), requires_grad=False)
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(error, match=match):
        get_peft_model(model, config(slug, ["fine", target] if target != "nowhere" else [target]))
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert model.fine.weight.requires_grad


@our_tuners
def test_a_second_adapter_that_is_refused_leaves_the_first(slug):
    model = adapted(slug, "text")
    first = ask(model)
    with pytest.raises(TypeError, match="Embedding"):
        model.add_adapter("other", config(slug, ["q_proj", "token_embedding"]))
    assert torch.equal(ask(model), first)
    assert all("other" not in layer.scaling for _, layer in tuner_layers(model))


@our_tuners
def test_tied_layers_are_refused(slug):
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"must not name tied layers, got lm_head: one tensor is transformer\.wte\.weight and"):
        get_peft_model(gpt, config(slug, ["lm_head"]))


@pytest.mark.parametrize("slug", READ_BASE)
def test_a_weight_that_cannot_be_read_is_refused(slug):
    model = nn.Sequential(nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"0\.weight must be finite"):
        get_peft_model(model, config(slug, ["0"]))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"0\.weight must be loaded, got the meta device"):
        get_peft_model(empty, config(slug, ["0"]))


@pytest.mark.parametrize("slug", READ_BASE)
def test_an_adapter_of_another_base_is_refused(slug, tmp_path):
    adapted(slug, "text").save_pretrained(tmp_path)
    other = build("text")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    with pytest.raises(ValueError, match="must be the weight that the adapter was trained on"):
        PeftModel.from_pretrained(other, tmp_path)
    rounded = build("text").to(torch.bfloat16)  # the same base, in half precision
    assert ask(PeftModel.from_pretrained(rounded, tmp_path)).isfinite().all()


@our_tuners
def test_adding_to_a_merged_model_is_refused(slug):
    model = adapted(slug, "text")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"must not be merged when an adapter is added, got default merged"):
        model.add_adapter("other", config(slug))


@our_tuners
def test_a_broken_adapter_is_not_merged_safely(slug):
    model = adapted(slug, "text")
    _, layer = next(tuner_layers(model))
    before = layer.weight.clone()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"merged with default must be finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before)


@our_tuners
def test_targets_must_be_known(slug):
    with pytest.raises(ValueError, match=r"target_modules must be given for a model of type None"):
        build("unet").add_adapter(TUNERS[slug](**OPTIONS[slug]))
    with pytest.raises(ValueError, match="layers_pattern must come with layers_to_transform"):
        config(slug, layers_pattern="layers")
    with pytest.raises(TypeError, match="rang"):
        config(slug, rang=3)
    one = get_peft_model(build("text"), config(slug, layers_to_transform=[1]))
    assert all(".1." in name for name, _ in tuner_layers(one))
    assert len(list(tuner_layers(one))) == 2


@our_tuners
def test_what_can_be_named_is_listed_also_beside_an_adapter(slug):
    model = adapted(slug, "unet")
    with pytest.raises(ValueError, match=r"can name .*net\.2, .*to_k, .*to_out\.0, to_q, to_v\.") as error:
        model.add_adapter("other", config(slug, ["query"]))
    assert not any(word in str(error.value) for word in ("base_layer", "conv_in", "norm"))


@our_tuners
@pytest.mark.parametrize("targets", [r".*\.0\..*q_proj", "all-linear"])
def test_targets_as_a_pattern_and_all_but_some(slug, targets):
    options = OPTIONS[slug] | {"target_modules": targets, "exclude_modules": ["fc2", "out_proj"]}
    names = {name.rpartition(".")[2] for name, _ in tuner_layers(get_peft_model(build("text"), TUNERS[slug](**options)))}
    assert names == ({"q_proj"} if "q_proj" in targets else {"q_proj", "k_proj", "v_proj", "fc1"})


@our_tuners
def test_modules_that_are_trained_whole_are_saved_beside_it(slug, tmp_path):
    model = get_peft_model(build("text"), config(slug, modules_to_save=["final_layer_norm"]))
    shake(model)
    model.save_pretrained(tmp_path)
    assert any(name.endswith("final_layer_norm.weight") for name in get_peft_model_state_dict(model))
    assert torch.equal(ask(PeftModel.from_pretrained(build("text"), tmp_path)), ask(model))


def test_register_is_enough_to_load(tmp_path):
    model = adapted("svfit", "text")
    model.save_pretrained(tmp_path)
    tables = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    before = [dict(table) for table in tables]
    for table in tables:
        table.pop("VALIGN_SVFIT")
    with pytest.raises(KeyError):  # a process that has not heard of valign
        PeftModel.from_pretrained(build("text"), tmp_path)
    register_tuners()
    register_tuners()
    assert torch.equal(ask(PeftModel.from_pretrained(build("text"), tmp_path)), ask(model))
    assert [dict(table) for table in tables] == before


def test_a_name_that_is_taken_is_not_overwritten(monkeypatch):
    class Foreign(TunerConfig):
        kind = TunerType("VALIGN_SVFIT")

        @classmethod
        def model_class(cls):
            return PEFT_TYPE_TO_TUNER_MAPPING["VALIGN_SVFIT"]

    TUNERS["svfit"]()
    with pytest.raises(RuntimeError, match=r"VALIGN_SVFIT must be free or valign's, got valign\.adapters"):
        register_tuner(Foreign)


@our_tuners
def test_models_with_adapters_are_copied(slug):
    model = adapted(slug, "text")
    twin = copy.deepcopy(model)
    shake(twin, seed=9)
    assert not torch.equal(ask(twin), ask(model))


@our_tuners
def test_the_last_adapter_of_a_layer_can_go(slug):
    model = adapted(slug, "text")
    with model.disable_adapter():
        base = ask(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    assert torch.equal(ask(model.base_model.model), base)
    layer = next(module for module in model.modules() if isinstance(module, TunerLayer))
    assert not layer.state_dict().keys() - {"base_layer.weight", "base_layer.bias"}
