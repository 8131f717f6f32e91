"""The kohya layout: diffusers reads what we write, names match diffusers' own table, and nothing changes on a round trip."""

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from valign.checks import UserError
from valign.models.files.adapter_files import WEIGHTS, LoraFactors, open_adapter, save_adapter
from valign.models.files.kohya import export_kohya, from_kohya, import_kohya, to_kohya

TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "time_emb_proj",
    "linear_1",
    "linear_2",
)

SDXL = {  # the published U-Net's structure with few channels; names depend on the structure alone
    "block_out_channels": (8, 16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (1, 2, 4),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 56,
}
SD = {"block_out_channels": (8, 8, 16, 16), "attention_head_dim": 2}


def published_unet(family):
    with torch.device("meta"):
        common = {"norm_num_groups": 8, "cross_attention_dim": 8, "use_linear_projection": True, "layers_per_block": 2}
        return UNet2DConditionModel(**common, **(SDXL if family == "sdxl" else SD))


def text_and_convolution_factors(pipe, seed=0):
    """Of every layer of the text encoders' attention, and of every convolution."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for part in [part for part in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, part)]:
        for name, layer in getattr(pipe, part).named_modules():
            kernel = tuple(layer.kernel_size) if isinstance(layer, torch.nn.Conv2d) else None
            if kernel is None and not (part != "unet" and name.endswith(("q_proj", "out_proj"))):
                continue
            full = name if part == "unet" else f"{part}.text_model.{name.removeprefix('text_model.')}"
            down = torch.randn(2, layer.weight[0].numel(), generator=generator)
            found[full] = LoraFactors(0.1 * down, 0.1 * torch.randn(len(layer.weight), 2, generator=generator), 1.0, kernel)
    return found


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl"])
def test_text_encoders_and_convolutions_go_both_ways(family, request, tmp_path, monkeypatch):
    from test_adapter_files import bake_all, whole_answer

    pipe = DiffusionPipeline.from_pretrained(request.getfixturevalue(family), safety_checker=None)
    factors = text_and_convolution_factors(pipe)
    save_adapter(tmp_path / "a", factors, metadata={"family": "sdxl" if family == "tiny_sdxl" else "stable-diffusion"})
    exported = export_kohya(tmp_path / "a", tmp_path / "a.safetensors", layers_per_block=1)
    assert {key.split("_")[1] for key in load_file(exported)} == {"unet", *(("te1", "te2") if family == "tiny_sdxl" else ("te",))}
    back = open_adapter(import_kohya(exported, tmp_path / "b", layers_per_block=1))
    assert back.modules == sorted(factors)
    for name, lora in back.items():
        assert lora.kernel == factors[name].kernel
        assert torch.equal(lora.delta(), factors[name].delta())
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)  # asks for 0.22, works with 0.21
    pipe.load_lora_weights(exported)
    loaded = whole_answer(pipe)
    pipe.unload_lora_weights()
    bake_all(pipe, factors)
    assert_close(loaded, whole_answer(pipe), rtol=0, atol=1e-4)


def linear_modules(unet, targets=TARGETS):
    layers = ((name, layer) for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear))
    return {name: tuple(layer.weight.shape) for name, layer in layers if name.endswith(targets)}


def factors_for(shapes, seed=0, spread=3):
    g = torch.Generator().manual_seed(seed)
    ranks = {name: 2 + i % spread for i, name in enumerate(sorted(shapes))}
    return {
        name: LoraFactors(0.2 * torch.randn(ranks[name], i, generator=g), 0.2 * torch.randn(o, ranks[name], generator=g), 1.0)
        for name, (o, i) in sorted(shapes.items())
    }


@pytest.mark.parametrize(("family", "count"), [("stable-diffusion", 128), ("sdxl", 560)])
def test_names_match_diffusers_table(family, count):
    unet = published_unet(family)
    names = linear_modules(unet)
    assert sum(name.endswith(("to_q", "to_k", "to_v", "to_out.0")) for name in names) == count  # as the published models
    keys = {f"lora_unet_{to_kohya(name, family)}.lora_down.weight": name for name in names}
    assert len(keys) == len(names)
    mapped = _maybe_map_sgm_blocks_to_diffusers({key: key for key in keys}, unet.config)
    assert len(mapped) == len(keys)
    for theirs, key in mapped.items():
        name = _convert_unet_lora_key(theirs).removesuffix(".lora.down.weight")
        # diffusers keeps its older spelling of attention layers here and normalizes it at the next stage
        name = name.replace(".processor.", ".").replace("_lora.down.weight", "").replace("to_out", "to_out.0")
        assert name == keys[key]
        assert from_kohya(key.removeprefix("lora_unet_").removesuffix(".lora_down.weight"), family) == keys[key]


@pytest.mark.parametrize("ranks", ["equal", "mixed"])
@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl"])
def test_diffusers_loads_the_exported_file(family, ranks, request, tmp_path):
    from test_adapter_files import answer, bake

    pipe = DiffusionPipeline.from_pretrained(request.getfixturevalue(family), safety_checker=None)
    factors = factors_for(linear_modules(pipe.unet, ("to_q", "to_k", "to_v", "to_out.0")), spread=3 if ranks == "mixed" else 1)
    save_adapter(tmp_path / "a", factors, metadata={})
    pipe.load_lora_weights(export_kohya(tmp_path / "a", tmp_path / "a.safetensors", layers_per_block=1))
    loaded = answer(pipe.unet)
    pipe.unload_lora_weights()
    before = answer(pipe.unet)
    bake(pipe.unet, factors)
    assert (answer(pipe.unet) - before).abs().max() > 1e-2
    assert_close(loaded, answer(pipe.unet), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spread", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["stable-diffusion", "sdxl"])
def test_round_trip_is_bitwise_both_ways(family, dtype, spread, tmp_path):
    factors = factors_for(linear_modules(published_unet(family)), spread=spread)
    save_adapter(tmp_path / "a", factors, metadata={"family": family, "category": "hate"}, dtype=dtype)
    export_kohya(tmp_path / "a", tmp_path / "k.safetensors")
    import_kohya(tmp_path / "k.safetensors", tmp_path / "b")
    export_kohya(tmp_path / "b", tmp_path / "l.safetensors")
    for name in (WEIGHTS, "valign.json") if spread == 1 else ():
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    before, after = open_adapter(tmp_path / "a"), open_adapter(tmp_path / "b")
    for name, lora in before.items():  # smaller ranks are filled up with zeros
        wide = after.factors(name)
        assert torch.equal(wide.down[: lora.rank], lora.down)
        assert torch.equal(wide.up[:, : lora.rank], lora.up)
        assert not wide.down[lora.rank :].any()
    assert (tmp_path / "k.safetensors").read_bytes() == (tmp_path / "l.safetensors").read_bytes()


def foreign(alpha, *, dtype=torch.float16, **more):
    g = torch.Generator().manual_seed(1)
    name = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0"
    down, up = torch.randn(4, 6, generator=g).to(dtype), torch.randn(8, 4, generator=g).to(dtype)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, **more}
    return {**tensors, f"{name}.alpha": torch.tensor(alpha, dtype=dtype)} if alpha is not None else tensors


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1), (4.0, 1), (1.0, 0.25), (8.0, 2)])
def test_alpha_of_a_foreign_file_is_folded(alpha, scale, tmp_path):
    tensors = foreign(alpha)
    save_file(tensors, tmp_path / "k.safetensors")
    opened = open_adapter(import_kohya(tmp_path / "k.safetensors", tmp_path / "a"))
    (module,) = opened.modules
    assert module == "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0"
    down, up = (value for key, value in tensors.items() if not key.endswith("alpha"))
    lora = opened.factors(module)
    assert lora.up.dtype == (torch.float16 if scale == 1 else torch.float32)
    assert torch.equal(lora.folded().up, up.float() * scale)  # exact: the scale is a power of two
    assert torch.equal(lora.down.float(), down.float())
    assert opened.metadata["family"] == "stable-diffusion"
    assert opened.metadata["sources"][0]["name"] == "k.safetensors"


def test_header_says_what_kohya_tools_ask(tmp_path):
    name = "up_blocks.0.attentions.1.transformer_blocks.3.attn1.to_q"
    save_adapter(tmp_path / "a", {name: LoraFactors(torch.ones(4, 8), torch.ones(8, 4), 1.0)}, metadata={})
    export_kohya(tmp_path / "a", tmp_path / "k.safetensors")
    with safe_open(tmp_path / "k.safetensors", "pt") as file:
        header = file.metadata()
    assert header["ss_network_module"] == "networks.lora"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "4")
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    assert "lora_unet_output_blocks_1_1_transformer_blocks_3_attn1_to_q.alpha" in load_file(tmp_path / "k.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            foreign(1.0, **{f"lora_te_x.lora_{side}.weight": torch.ones(1, 1) for side in ("down", "up")}),
            "CLIP text encoder's layer",
        ),
        (foreign(1.0, **{"lora_unet_x.hada_w1_a": torch.ones(1)}), "must be plain LoRA, got lora_unet_x.hada_w1_a"),
        (foreign(1.0, **{"lora_unet_mid_block_to_q.lora_up.weight": torch.ones(1, 1)}), "lora_down and lora_up"),
        (
            {
                "lora_unet_mid_block_proj_in.lora_down.weight": torch.ones(2, 4, 3, 3),
                "lora_unet_mid_block_proj_in.lora_up.weight": torch.ones(4, 2, 3, 3),
            },
            "or a convolution",
        ),
        (
            {
                "lora_unet_input_blocks_x_to_q.lora_down.weight": torch.ones(2, 4),
                "lora_unet_input_blocks_x_to_q.lora_up.weight": torch.ones(4, 2),
            },
            "not a name of an SDXL U-Net",
        ),
        ({}, "got 0 tensors"),
    ],
)
def test_refuses_what_it_cannot_read(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "k.safetensors")
    with pytest.raises(UserError, match=message):
        import_kohya(tmp_path / "k.safetensors", tmp_path / "out")
    assert not (tmp_path / "out" / WEIGHTS).exists()


def test_refuses_pickles_and_unknown_families(tmp_path):
    with pytest.raises(UserError, match="Pickles are not read"):
        import_kohya(tmp_path / "k.ckpt", tmp_path / "out")
    lora = LoraFactors(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    save_adapter(tmp_path / "a", {"mid_block.attentions.0.proj_in": lora}, metadata={})
    with pytest.raises(UserError, match="Name it: --family"):
        export_kohya(tmp_path / "a", tmp_path / "k.safetensors")
    export_kohya(tmp_path / "a", tmp_path / "k.safetensors", family="stable-diffusion")
    save_adapter(tmp_path / "b", {"conv_in.linear": lora}, metadata={"family": "sdxl"})
    with pytest.raises(UserError, match="no kohya name in SDXL"):
        export_kohya(tmp_path / "b", tmp_path / "k.safetensors")


def test_an_exported_file_has_one_rank_and_one_alpha(tmp_path):
    ranks = {"1.to_k": 6, "1.to_q": 2, "2.to_k": 2}
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn"
    factors = {f"{block}{name}": LoraFactors(torch.randn(r, 768), torch.randn(32, r), 0.5) for name, r in ranks.items()}
    save_adapter(tmp_path / "a", factors, metadata={})
    saved = load_file(export_kohya(tmp_path / "a", tmp_path / "k.safetensors"))
    assert {float(value) for key, value in saved.items() if key.endswith("alpha")} == {6.0}
    assert {value.shape[0] for key, value in saved.items() if key.endswith("lora_down.weight")} == {6}
    assert len([key for key in saved if key.endswith("alpha")]) == len(ranks)
    with safe_open(tmp_path / "k.safetensors", "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sd_v1"  # text of 768 numbers a token


SGM = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
OURS = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize("name", [f"unet.{OURS}", f"unet.{SGM}", f"diffusion_model.{SGM}", f"model.diffusion_model.{SGM}"])
@pytest.mark.parametrize("halves", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_layouts_with_dots_are_read(name, halves, tmp_path):
    down, up = torch.randn(4, 2048), torch.randn(32, 4)
    tensors = {f"{name}.{halves[0]}.weight": down, f"{name}.{halves[1]}.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "k.safetensors")
    opened = open_adapter(import_kohya(tmp_path / "k.safetensors", tmp_path / "a"))
    torch.testing.assert_close(opened.factors(OURS).delta(), 0.5 * up @ down)
    assert opened.metadata["family"] == "sdxl"  # text of 2048 numbers a token


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj", "must adapt the U-Net of Stable Diffusion"),
        ("transformer.single_blocks.0.linear1", "is it for another model"),
        ("te1.text_model.encoder.layers.0.q_proj", "CLIP text encoder's layer"),
    ],
)
def test_names_of_other_models_are_refused(name, message, tmp_path):
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}, tmp_path / "k.safetensors"
    )
    with pytest.raises(UserError, match=message):
        import_kohya(tmp_path / "k.safetensors", tmp_path / "a")


def test_the_widest_precision_of_a_mixed_file_is_kept(tmp_path):
    stem, down, up = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_", torch.randn(2, 8), torch.randn(8, 2)
    up[0, 0] = 7e4  # beyond half precision
    half = {f"{stem}k.lora_down.weight": down.half(), f"{stem}k.lora_up.weight": torch.ones(8, 2).half()}
    save_file({**half, f"{stem}q.lora_down.weight": down, f"{stem}q.lora_up.weight": up}, tmp_path / "k.safetensors")
    opened = open_adapter(import_kohya(tmp_path / "k.safetensors", tmp_path / "a"))
    got = opened.factors("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
    assert torch.equal(got.down, down)
    assert torch.equal(got.up, up)
