"""Adapter files: what is written loads everywhere, what is read means the same, what is not LoRA is refused."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from valign.checks import UserError
from valign.files import read_json
from valign.models.files.adapter_files import PEFT_WEIGHTS, WEIGHTS, LoraFactors, lora_config, open_adapter, save_adapter

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def attention_shapes(unet):
    return {name: tuple(layer.weight.shape) for name, layer in unet.named_modules() if name.endswith(TARGETS)}


def random_factors(shapes, *, ranks=(2, 3, 5), scales=(1.0, 0.5, 0.3), seed=0):
    """Mixed ranks and scales, small enough that a U-Net stays in its range."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for i, (name, (fan_out, fan_in)) in enumerate(sorted(shapes.items())):
        rank = ranks[i % len(ranks)]
        down, up = torch.randn(rank, fan_in, generator=g), torch.randn(fan_out, rank, generator=g)
        made[name] = LoraFactors(down * 0.2, up * 0.2, scales[i % len(scales)])
    return made


FEW = random_factors({f"down_blocks.0.attentions.{i}.to_q": (6, 4) for i in range(4)})


def unet_inputs(unet, seed=0):
    g = torch.Generator().manual_seed(seed)
    config = unet.config
    inputs = {
        "sample": torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=g),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": torch.randn(2, 7, config.cross_attention_dim, generator=g),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, pooled, generator=g), "time_ids": torch.full((2, 6), 64.0)}
    return inputs


@torch.no_grad()
def answer(unet):
    return unet(**unet_inputs(unet)).sample


@torch.no_grad()
def bake(unet, factors):
    """The slow, obvious adapter: add every dense delta to its weight."""
    for name, lora in factors.items():
        unet.get_submodule(name).weight += lora.delta()


def bake_all(pipe, factors):
    """`bake`, of a whole pipeline: text encoders, and convolutions."""
    for name, lora in factors.items():
        part = next((part for part in ("text_encoder", "text_encoder_2") if name.startswith(f"{part}.")), "unet")
        network, inner = getattr(pipe, part), name.removeprefix(f"{part}.")
        inner = inner if part == "unet" or hasattr(network, "text_model") else inner.removeprefix("text_model.")
        weight = network.get_submodule(inner).weight
        with torch.no_grad():
            weight += lora.delta().view_as(weight)


@torch.no_grad()
def whole_answer(pipe):
    """What the U-Net says about a prompt that the text encoders read."""
    texts = pipe.encode_prompt("a red man", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    unet, more = pipe.unet, {}
    if len(texts) == 4:
        more["added_cond_kwargs"] = {"text_embeds": texts[2], "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])}
    noisy = torch.randn(1, 4, unet.config.sample_size, unet.config.sample_size, generator=torch.Generator().manual_seed(0))
    return unet(noisy, torch.tensor([7]), encoder_hidden_states=texts[0], **more).sample


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl"])
def test_text_encoders_and_convolutions_load_here_and_in_diffusers(family, request, tmp_path, monkeypatch):
    from test_kohya import text_and_convolution_factors

    from valign.models.diffusion.loading import load_model
    from valign.models.diffusion.lora import adapter_off, adapter_weights, load_adapter, unload_adapters

    model = load_model(str(request.getfixturevalue(family)), device="cpu")
    pipe, factors = model.pipe, text_and_convolution_factors(model.pipe)
    save_adapter(tmp_path / "a", factors, metadata={})
    opened = open_adapter(tmp_path / "a")
    assert opened.modules == sorted(factors)
    assert all(torch.equal(lora.delta(), factors[name].delta()) for name, lora in opened.items())
    assert {name: entry.kernel for name, entry in opened.entries.items()} == {name: one.kernel for name, one in factors.items()}
    base = whole_answer(pipe)
    load_adapter(model, tmp_path / "a", name="mine", weight=0.5)
    load_adapter(model, tmp_path / "a", name="again", weight=0.5)
    ours = whole_answer(pipe)
    assert adapter_weights(model) == {"mine": 0.5, "again": 0.5}
    with adapter_off(model):
        assert torch.equal(whole_answer(pipe), base)
    unload_adapters(model)
    assert torch.equal(whole_answer(pipe), base)
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)  # asks for 0.22, works with 0.21
    pipe.load_lora_weights(tmp_path / "a")
    theirs = whole_answer(pipe)
    pipe.unload_lora_weights()
    bake_all(pipe, factors)
    assert (theirs - base).abs().max() > 1e-2
    assert_close(ours, whole_answer(pipe), rtol=0, atol=1e-4)
    assert_close(theirs, whole_answer(pipe), rtol=0, atol=1e-4)


@pytest.mark.parametrize("prefix", ["text_encoder.text_model.", "text_encoder."])
def test_a_text_encoders_root_may_be_missing_in_file_and_config(prefix, tmp_path):
    layer = "encoder.layers.0.self_attn.q_proj"
    config = {"text_encoder.r": 4, "text_encoder.lora_alpha": 4, "text_encoder.rank_pattern": {f"^{layer}": 2}}
    config["text_encoder.alpha_pattern"] = {f"^text_model.{layer}": 1}
    tensors = {f"{prefix}{layer}.lora_A.weight": torch.ones(2, 6), f"{prefix}{layer}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"lora_adapter_metadata": json.dumps(config)})
    opened = open_adapter(tmp_path)
    assert opened.modules == [f"text_encoder.text_model.{layer}"]
    assert_close(opened.factors(opened.modules[0]).delta(), torch.ones(8, 6))  # 2 ranks x alpha 1 / rank 2


@pytest.mark.parametrize("where", ["folder", "file"])
@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl"])
def test_diffusers_loads_what_is_saved(family, where, request, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(request.getfixturevalue(family), safety_checker=None)
    base = answer(pipe.unet)
    factors = random_factors(attention_shapes(pipe.unet))
    save_adapter(tmp_path / "a", factors, metadata={"family": "any"})
    pipe.load_lora_weights(tmp_path / "a" if where == "folder" else tmp_path / "a" / WEIGHTS)
    loaded = answer(pipe.unet)
    pipe.unload_lora_weights()
    bake(pipe.unet, factors)
    expected = answer(pipe.unet)
    assert (expected - base).abs().max() > 1e-2  # the adapter does something
    assert_close(loaded, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl"])
def test_the_runtime_adapter_is_the_same_function(family, request, tmp_path):
    from valign.models.diffusion.loading import load_model
    from valign.models.diffusion.lora import load_adapter

    model = load_model(str(request.getfixturevalue(family)), device="cpu")
    factors = random_factors(attention_shapes(model.denoiser))
    save_adapter(tmp_path / "a", factors, metadata={})
    load_adapter(model, tmp_path / "a", name="mine")
    here = answer(model.denoiser)
    pipe = DiffusionPipeline.from_pretrained(request.getfixturevalue(family), safety_checker=None)
    pipe.load_lora_weights(tmp_path / "a")
    assert_close(here, answer(pipe.unet), rtol=0, atol=1e-5)


def test_round_trip_folds_scales_and_keeps_everything_else(tmp_path):
    save_adapter(tmp_path, FEW, metadata={"base": "tiny", "category": "hate"})
    opened = open_adapter(tmp_path)
    assert opened.modules == sorted(FEW)
    assert opened.metadata == {"base": "tiny", "category": "hate"}
    for name, lora in opened.items():
        assert lora.scale == 1
        assert torch.equal(lora.down, FEW[name].down)
        assert torch.equal(lora.up, FEW[name].up * FEW[name].scale)
        assert opened.entries[name].shape == lora.shape == (6, 4)
        assert opened.entries[name].rank == lora.rank


def test_every_key_has_the_prefix_of_the_adapted_component(tmp_path):
    save_adapter(tmp_path / "a", FEW, metadata={})
    assert open_adapter(tmp_path / "a").prefix == "unet."
    save_adapter(tmp_path / "b", FEW, metadata={}, prefix="denoiser.")
    with safe_open(tmp_path / "b" / WEIGHTS, framework="pt") as file:
        assert all(key.startswith("denoiser.") for key in file.keys())  # noqa: SIM118
        assert all(key.startswith("denoiser.") for key in json.loads(file.metadata()["lora_adapter_metadata"]))


def test_saving_again_gives_the_same_bytes(tmp_path):
    save_adapter(tmp_path / "a", FEW, metadata={"b": 1, "a": 2})
    opened = open_adapter(tmp_path / "a")
    save_adapter(tmp_path / "b", opened.items(), metadata={"a": 2, "b": 1})
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    assert opened.fingerprint() == open_adapter(tmp_path / "b").fingerprint()


def test_fingerprint_sees_a_single_number(tmp_path):
    save_adapter(tmp_path / "a", FEW, metadata={})
    name = sorted(FEW)[0]
    save_adapter(tmp_path / "b", {**FEW, name: LoraFactors(FEW[name].down, FEW[name].up, 0.999)}, metadata={})
    assert open_adapter(tmp_path / "a").fingerprint() != open_adapter(tmp_path / "b").fingerprint()


def test_header_is_what_peft_needs(tmp_path):
    save_adapter(tmp_path, FEW, metadata={})
    ranks = {name: lora.rank for name, lora in FEW.items()}
    config = LoraConfig(**lora_config(ranks))
    assert config.r == config.lora_alpha == 2  # ranks are 2, 3, 5, 2
    assert config.rank_pattern == config.alpha_pattern == {f"^{name}": rank for name, rank in ranks.items() if rank != 2}


def test_a_failed_stream_leaves_the_old_adapter(tmp_path):
    save_adapter(tmp_path, FEW, metadata={"made": 1})
    before = (tmp_path / WEIGHTS).read_bytes()

    def breaks():
        yield next(iter(FEW.items()))
        raise RuntimeError("training broke")

    with pytest.raises(RuntimeError):
        save_adapter(tmp_path, breaks(), metadata={"made": 2})
    assert (tmp_path / WEIGHTS).read_bytes() == before
    assert read_json(tmp_path / "valign.json") == {"made": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", WEIGHTS, "valign.json"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_safetensors_reads_every_dtype_we_stream(dtype, tmp_path):
    save_adapter(tmp_path, FEW, metadata={}, dtype=dtype)
    tensors = load_file(tmp_path / WEIGHTS)
    assert len(tensors) == 2 * len(FEW)
    for name, lora in FEW.items():
        assert torch.equal(tensors[f"unet.{name}.lora_A.weight"], lora.down.to(dtype))


def test_an_adapter_in_a_run_folder_is_found(tmp_path):
    save_adapter(tmp_path / "adapter", FEW, metadata={})
    assert open_adapter(tmp_path).modules == sorted(FEW)


# --- what others wrote ---


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layers = {"to_q": torch.nn.Linear(6, 8), "to_k": torch.nn.Linear(6, 8), "to_v": torch.nn.Linear(8, 5)}
        self.mid_block = torch.nn.ModuleDict({"attentions": torch.nn.ModuleList([torch.nn.ModuleDict(layers)])})


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 8},
        {"lora_alpha": 8, "use_rslora": True},
        {"lora_alpha": 6, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 7, "^mid_block.attentions.0.to_v": 1}},
        {"lora_alpha": 6, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 7}, "use_rslora": True},
    ],
)
def test_reads_peft_folders(options, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(Toy(), LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False, **options))
    model.save_pretrained(tmp_path)
    opened = open_adapter(tmp_path)
    assert opened.modules == [f"mid_block.attentions.0.to_{part}" for part in "kqv"]
    for name, lora in opened.items():
        layer = model.base_model.model.get_submodule(name)
        assert_close(lora.delta(), layer.get_delta_weight("default"))
        assert_close(lora.folded(-2).delta(), -2 * layer.get_delta_weight("default"))


@pytest.mark.parametrize("with_metadata", [True, False])
def test_reads_what_diffusers_saves(tiny_sd, with_metadata, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    config = LoraConfig(r=4, lora_alpha=8 if with_metadata else 4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    said = {"unet_lora_adapter_metadata": config.to_dict()} if with_metadata else {}
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers, **said)
    opened = open_adapter(tmp_path)
    assert len(opened.modules) == len(layers) // 2
    for name, lora in opened.items():
        assert_close(lora.delta(), pipe.unet.get_submodule(name).get_delta_weight("default"))


def test_reads_old_diffusers_names(tmp_path):
    down, up = torch.randn(2, 6), torch.randn(8, 2)
    save_file(
        {
            "unet.mid_block.attentions.0.attn1.processor.to_q_lora.down.weight": down.clone(),
            "unet.mid_block.attentions.0.attn1.processor.to_q_lora.up.weight": up.clone(),
            "unet.mid_block.attentions.0.attn1.processor.to_out_lora.down.weight": down.clone(),
            "unet.mid_block.attentions.0.attn1.processor.to_out_lora.up.weight": up.clone(),
            "unet.mid_block.attentions.0.attn2.to_v.lora.down.weight": down.clone(),
            "unet.mid_block.attentions.0.attn2.to_v.lora.up.weight": up.clone(),
            "unet.mid_block.attentions.0.attn2.to_v.alpha": torch.tensor(1.0),
        },
        tmp_path / "old.safetensors",
    )
    opened = open_adapter(tmp_path / "old.safetensors")
    assert opened.modules == [
        "mid_block.attentions.0.attn1.to_out.0",
        "mid_block.attentions.0.attn1.to_q",
        "mid_block.attentions.0.attn2.to_v",
    ]
    assert_close(opened.factors("mid_block.attentions.0.attn1.to_q").delta(), up @ down)
    assert_close(opened.factors("mid_block.attentions.0.attn2.to_v").delta(), up @ down / 2)  # alpha 1, rank 2


def test_a_1_x_1_convolution_is_a_linear_layer(tmp_path):
    down, up = torch.randn(2, 6), torch.randn(8, 2)
    name = "mid_block.attentions.0.proj_in"
    save_file(
        {f"unet.{name}.lora_A.weight": down[..., None, None], f"unet.{name}.lora_B.weight": up[..., None, None]}, tmp_path / WEIGHTS
    )
    assert_close(open_adapter(tmp_path).factors(name).delta(), up @ down)


# --- what is refused ---


@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_q", "a transformer such as Flux or SD3|another model"),
        ("transformer_blocks.0.attn.to_q", "a transformer such as Flux or SD3"),
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", "a U-Net in ComfyUI's names"),
        ("base_model.model.model.layers.0.self_attn.q_proj", "a language model"),
        ("text_model.encoder.layers.0.self_attn.q_proj", "a text encoder"),
        ("blocks.0.cross_attn.q", "a language model|another model"),
        ("down_blocks.0.to_q", "another model"),
    ],
)
def test_modules_of_other_models_are_refused_and_named(module, what, tmp_path):
    save_file({f"{module}.lora_A.weight": torch.ones(2, 4), f"{module}.lora_B.weight": torch.ones(4, 2)}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=f"must adapt the U-Net of Stable Diffusion, got .*, which is of ({what})"):
        open_adapter(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_when_it_is_read(bad, tmp_path):
    name = "unet.mid_block.attentions.0.to_q"
    save_file({f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.full((4, 2), bad)}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"mid_block\.attentions\.0\.to_q\.lora_B\.weight must be finite, got NaN or infinity"):
        dict(open_adapter(tmp_path).items())


def test_what_half_precision_cannot_hold_is_refused(tmp_path):
    lora = LoraFactors(torch.ones(1, 2), torch.full((2, 1), 7e4), 1.0)
    with pytest.raises(UserError, match="must be finite"):
        save_adapter(tmp_path, {"mid_block.attentions.0.to_q": lora}, metadata={}, dtype=torch.float16)


A, B = torch.zeros(2, 6), torch.zeros(8, 2)
PAIR = {"unet.m.to_q.lora_A.weight": A, "unet.m.to_q.lora_B.weight": B}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**PAIR, "unet.m.to_q.lora_magnitude_vector": torch.zeros(8)}, "DoRA"),
        ({**PAIR, "unet.m.to_q.lora_B.bias": torch.zeros(8)}, "biases"),
        ({**PAIR, "text_encoder.m.lora_A.weight": A}, "both factors"),
        ({"text_encoder.m.lora_A.weight": A, "text_encoder.m.lora_B.weight": B}, "which is of a text encoder"),
        ({"unet.m.to_q.lora_A.weight": A}, "both factors"),
        ({"unet.m.lora_A.weight": torch.zeros(2, 6, 3, 3), "unet.m.lora_B.weight": torch.zeros(8, 2, 3, 3)}, "or a convolution"),
        ({"unet.m.lora_A.weight": torch.zeros(3, 6), "unet.m.lora_B.weight": B}, "one rank"),
        ({"unet.m.lora_embedding_A": A, "unet.m.lora_embedding_B": B}, "embeddings"),
        ({"unet.m.hada_w1_a": A}, "LoHa"),
        ({"unet.m.lokr_w1": A}, "LoKr"),
        ({"lora_unet_mid_block_to_q.lora_down.weight": A}, "valign adapter import"),
        ({"unet.m.to_q.weight": A}, "LoRA factors only"),
        ({}, "got none"),
    ],
)
def test_refuses_what_is_not_plain_lora(tensors, message, tmp_path):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        open_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trained biases"),
        ({"modules_to_save": ["conv_out"]}, "modules_to_save"),
        ({"peft_type": "LOHA"}, "got LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "rewrites the base"),
        ({"r": 3}, "must be 3"),
        ({"target_parameters": ["w"]}, "bare parameters"),
    ],
)
def test_refuses_peft_configs_that_mean_more(change, message, tmp_path):
    save_file({f"base_model.model.{key.removeprefix('unet.')}": value for key, value in PAIR.items()}, tmp_path / PEFT_WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none", **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        open_adapter(tmp_path)


def test_refuses_files_that_are_not_adapters(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_adapter(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no adapter"):
        open_adapter(tmp_path)
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="a pickle"):
        open_adapter(tmp_path)
    with pytest.raises(UserError, match="Pickles are not read"):
        open_adapter(tmp_path / "pytorch_lora_weights.bin")
    (tmp_path / "b.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        open_adapter(tmp_path)
    save_file(PAIR, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"must hold one adapter, got a\.safetensors, b\.safetensors"):
        open_adapter(tmp_path)
    save_file(PAIR, tmp_path / PEFT_WEIGHTS)
    with pytest.raises(UserError, match=r"adapter_config\.json does not exist"):
        open_adapter(tmp_path)


def test_refuses_to_save_nonsense(tmp_path):
    with pytest.raises(UserError, match="at least one module"):
        save_adapter(tmp_path, {}, metadata={})
    bad = LoraFactors(torch.full((1, 4), float("nan")), torch.ones(6, 1), 1.0)
    with pytest.raises(UserError, match="of m must be finite"):
        save_adapter(tmp_path, {"m": bad}, metadata={})
    with pytest.raises(UserError, match="twice"):
        save_adapter(tmp_path, iter([*FEW.items(), *FEW.items()]), metadata={})
    assert list(tmp_path.iterdir()) == []
    save_adapter(tmp_path, FEW, metadata={})
    with pytest.raises(UserError, match="must adapt m, got 4 others"):
        open_adapter(tmp_path).factors("m")


def test_a_change_of_weight_keeps_double_precision():
    down, up = (torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) for shape in ((2, 5), (4, 2)))
    found = LoraFactors(down, up, 0.3).delta()
    assert_close(found, 0.3 * up @ down, rtol=1e-14, atol=0)
    assert LoraFactors(down.half(), up.half(), 0.3).delta().dtype == torch.float32


EMPTY = {
    "unet.mid_block.attentions.0.to_k.lora_A.weight": torch.ones(0, 4),
    "unet.mid_block.attentions.0.to_k.lora_B.weight": torch.ones(4, 0),
}


def hostile(tmp_path, *, tensors=None, config=None, header=None):
    """A diffusers file of one module with something wrong in it."""
    good = {
        "unet.mid_block.attentions.0.to_q.lora_A.weight": torch.ones(2, 4),
        "unet.mid_block.attentions.0.to_q.lora_B.weight": torch.ones(4, 2),
    }
    said = json.dumps({f"unet.{key}": value for key, value in (config or {}).items()}) if header is None else header
    save_file({**good, **(tensors or {})}, tmp_path / WEIGHTS, metadata={"lora_adapter_metadata": said})
    return tmp_path


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"header": "[1]"}, "lora_adapter_metadata in its header must be a JSON object"),
        ({"header": "[" * 100_000}, "lora_adapter_metadata in its header must be a JSON object"),
        ({"header": "no json"}, "lora_adapter_metadata in its header must be a JSON object"),
        ({"config": {"r": 2, "lora_alpha": None}}, "lora_alpha must be a finite number, got None"),
        ({"config": {"r": 2, "lora_alpha": float("nan")}}, "lora_alpha must be a finite number, got nan"),
        ({"config": {"r": "2", "lora_alpha": 2}}, "r must be a finite number, got '2'"),
        (
            {"config": {"r": 2, "lora_alpha": 1e308}},
            r"the scale of mid_block.attentions.0.to_q must be at most 1e\+06, got 5e\+307",
        ),
        (
            {"config": {"r": 2, "lora_alpha": 2, "rank_pattern": {r"([\w.]+)+!": 2}}},
            "keys of rank_pattern must be names",
        ),
        ({"config": {"r": 2, "lora_alpha": 2, "alpha_pattern": {"(": 2}}}, "keys of alpha_pattern must be names"),
        ({"config": {"r": 2, "lora_alpha": 2, "alpha_pattern": {"to_q": "2"}}}, "alpha_pattern must be a finite number, got '2'"),
        ({"config": {"r": 2, "lora_alpha": 2, "rank_pattern": [1]}}, "rank_pattern must be a mapping"),
        ({"config": {"r": 2, "lora_alpha": 2, "use_rslora": "no"}}, "use_rslora must be a bool, got 'no'"),
        (
            {"tensors": {"unet.mid_block.attentions.0.to_q.alpha": torch.ones(3)}},
            r"alpha must be one finite number, got shape \(3,\)",
        ),
        ({"tensors": {"unet.mid_block.attentions.0.to_q.alpha": torch.tensor(float("inf"))}}, "alpha must be one finite number"),
        (
            {
                "tensors": {
                    "unet.mid_block.attentions.0.to_k.lora_A.weight": torch.ones(0, 4),
                    "unet.mid_block.attentions.0.to_k.lora_B.weight": torch.ones(4, 0),
                }
            },
            "rank of at",
        ),
    ],
)
def test_a_header_is_checked_field_by_field(tmp_path, wrong, says):
    with pytest.raises(UserError, match=rf"{WEIGHTS}.*{says}"):
        open_adapter(hostile(tmp_path, **wrong))


def test_factors_that_are_not_finite_are_refused_with_their_file(tmp_path):
    bad = torch.ones(2, 4)
    bad[0, 0] = float("nan")
    file = open_adapter(hostile(tmp_path, tensors={"unet.mid_block.attentions.0.to_q.lora_A.weight": bad}))
    with pytest.raises(UserError, match=rf"{WEIGHTS}: unet\..*\.to_q\.lora_A\.weight must be finite, got NaN"):
        file.factors("mid_block.attentions.0.to_q")


@pytest.mark.parametrize(
    ("base", "kept"),
    [
        ("/home/somebody/models/sd15", "sd15"),
        ("/home/somebody/.cache/huggingface/hub/models--owner--name/snapshots/0a1b", "owner/name"),
        ("owner/name", "owner/name"),
        ("~/models/sd15/", "sd15"),
    ],
)
def test_no_folder_of_this_machine_is_written(tmp_path, base, kept):
    factors = {"mid_block.attentions.0.to_q": LoraFactors(torch.ones(2, 4), torch.ones(4, 2), 1.0)}
    save_adapter(tmp_path / "a", factors, metadata={"base": base})
    assert open_adapter(tmp_path / "a").metadata["base"] == kept
    assert kept == base or base.encode() not in (tmp_path / "a" / WEIGHTS).read_bytes()
