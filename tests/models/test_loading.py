"""Loading: what is accepted, what is refused and how it says so, and the fingerprint."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from valign.checks import UserError
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.loading import load_model


@pytest.fixture
def folder(tiny_sd, tmp_path):
    """A copy of the miniature that a test may break."""
    return shutil.copytree(tiny_sd, tmp_path / "model")


def edit_index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_loaded_model_fulfils_the_protocol(tiny_sd, tiny_sdxl):
    for path in (tiny_sd, tiny_sdxl):
        model = load_model(str(path))
        assert isinstance(model, DiffusionModel)
        assert model.folder == str(path)
        assert getattr(model.pipe, "safety_checker", None) is None


def test_the_safety_checker_of_a_folder_is_left_out(folder):
    edit_index(folder, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"], requires_safety_checker=True)
    assert load_model(folder).pipe.safety_checker is None  # its weights are not even there


@pytest.mark.parametrize("pickle", ["diffusion_pytorch_model.bin", "unet.ckpt", "model.pt"])
def test_refuses_pickled_weights_by_name_and_says_how_to_convert_them(folder, pickle):
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet" / pickle)
    with pytest.raises(UserError, match=rf"unet/{pickle} is a pickle.*use_safetensors=False\).save_pretrained\(NEW_FOLDER\)"):
        load_model(folder)


def test_a_pickle_beside_safetensors_is_not_opened(folder):
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    load_model(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/model", r"/nowhere/model does not exist\. Give a diffusers folder, or a hub id"),
        ("nowhere", "nowhere does not exist"),
        (
            "nobody/nothing",
            r"nobody/nothing is not a folder here and could not be fetched from the hub: [^(]{0,99}\. Check the spelling",
        ),
    ],
)
def test_refuses_a_model_that_is_nowhere(name, message):
    with pytest.raises(UserError, match=message):
        load_model(name)


def test_refuses_a_single_file_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"must be a model folder, got a file\. Convert .*from_single_file\(FILE\)"):
        load_model(tmp_path / "model.safetensors")


def test_refuses_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"has no model_index\.json, so it is not a diffusers model"):
        load_model(tmp_path)


def test_refuses_another_architecture_and_lists_its_own(folder):
    edit_index(folder, _class_name="FluxPipeline")
    with pytest.raises(UserError, match="must be one of StableDiffusionPipeline, StableDiffusionXLPipeline; got FluxPipeline"):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_refuses_a_broken_index(folder, text):
    (folder / "model_index.json").write_text(text)
    with pytest.raises(UserError, match=r"model_index\.json is not JSON|must be one of StableDiffusionPipeline"):
        load_model(folder)


def test_refuses_missing_weights(folder):
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="vae has no safetensors file"):
        load_model(folder)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_refuses_truncated_weights(folder, part):
    path = folder / f"{part}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"could not be loaded: .*\. Download or save the model again"):
        load_model(folder)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"])
@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_refuses_weights_that_are_not_those_of_the_architecture(folder, part, damage):
    path = folder / f"{part}.safetensors"
    tensors = load_file(path)
    name = max(name for name in tensors if tensors[name].ndim == 2 or tensors[name].ndim == 4)
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:1].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(folder)


def test_refuses_a_folder_without_its_tokenizer(folder):
    """transformers makes a tokenizer of two words from nothing, and every prompt gives the same image."""
    names = [file.name for file in (folder / "tokenizer").iterdir()]
    for name in ("vocab.json", "tokenizer.json"):
        if name in names:
            (folder / "tokenizer" / name).write_text('{"model": {"vocab": {"a": 0}}}')
    with pytest.raises(UserError, match=r"tokenizer/\w+\.json must have the \d+ words of the text encoder, got 1"):
        load_model(folder, device="cpu")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer/vocab\.json does not exist, and no tokenizer\.json beside it"):
        load_model(folder, device="cpu")


def test_refuses_weights_that_are_not_finite(folder):
    path = next((folder / "unet").glob("*.safetensors"))
    weights = load_file(path)
    weights["conv_in.bias"][0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"unet: conv_in\.bias must be finite, got NaN"):
        load_model(folder, device="cpu")


def test_refuses_code_from_the_folder(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edit_index(folder, unet=["evil", "UNet2DConditionModel"], scheduler=["evil", "PNDMScheduler"])
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(folder)


@pytest.mark.parametrize("named", [["diffusers", "UNet2DConditionModel"], ["os", "system"], ["diffusers", "NoScheduler"], None])
def test_a_scheduler_is_a_scheduler_whatever_the_index_names(folder, named):
    """A network in its place would be loaded from a pickle beside it."""
    edit_index(folder, scheduler=named)
    torch.save({}, folder / "scheduler" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"must name a scheduler of diffusers, got (UNet2DConditionModel|system|NoScheduler|None)"):
        load_model(folder)


@pytest.mark.parametrize("named", [["transformers", "CLIPTextModel"], ["own_code", "Tokenizer"]])
def test_a_tokenizer_is_read_as_clips_whatever_the_index_names(folder, named):
    plain = load_model(folder).text_read(["a cat"])
    edit_index(folder, tokenizer=named)
    assert load_model(folder).text_read(["a cat"]) == plain


def test_options_of_the_pipeline_are_those_of_its_folder(tiny_sdxl, tmp_path):
    folder = shutil.copytree(tiny_sdxl, tmp_path / "xl")
    edit_index(folder, force_zeros_for_empty_prompt=False)
    assert load_model(folder).pipe.config.force_zeros_for_empty_prompt is False


def test_refuses_an_unknown_prediction(folder):
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "sample"}))
    with pytest.raises(UserError, match="must predict epsilon or v_prediction, got 'sample'"):
        load_model(folder)


def test_refuses_a_guidance_distilled_unet(folder):
    path = folder / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "time_cond_proj_dim": 8}))
    tensors = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    tensors["time_embedding.cond_proj.weight"] = torch.zeros(32, 8)
    save_file(tensors, folder / "unet/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="is a guidance-distilled model"):
        load_model(folder)


def test_half_precision_variants_are_found(folder, tmp_path):
    unet, network = folder / "unet", load_model(folder).denoiser
    weight = next(network.parameters())
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):  # a folder may mix them
        (folder / f"{part}.safetensors").rename(folder / f"{part}.fp16.safetensors")
    assert load_model(folder).dtype == torch.float32
    (unet / "diffusion_pytorch_model.fp16.safetensors").unlink()
    network.save_pretrained(unet, variant="fp16", max_shard_size="200KB")
    assert len(list(unet.glob("*.fp16-*.safetensors"))) > 1
    assert torch.equal(next(load_model(folder).denoiser.parameters()), weight)
    torch.nn.init.zeros_(weight)
    network.save_pretrained(tmp_path / "plain", max_shard_size="200KB")
    shutil.copytree(tmp_path / "plain", unet, dirs_exist_ok=True)  # where both are there, the plain one counts
    assert not next(load_model(folder).denoiser.parameters()).any()


def test_refuses_another_dtype():
    with pytest.raises(ValueError, match=r"load_model\.dtype must be one of auto, float32, bfloat16, float16; got 'int8'"):
        load_model("x", dtype="int8")


def test_the_fingerprint_is_that_of_the_content(tiny_sd, tiny_sd_v, folder):
    reference = load_model(tiny_sd).fingerprint()
    assert len(reference) == 64
    assert load_model(folder).fingerprint() == reference  # another place, the same model
    assert load_model(tiny_sd_v).fingerprint() != reference
    (folder / "README.md").write_text("a note")
    (folder / "unet/diffusion_pytorch_model.bin").touch()
    assert load_model(folder).fingerprint() == reference
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert load_model(folder).fingerprint() != reference


def test_a_tokenizer_without_a_length_takes_the_encoders(folder):
    path = folder / "tokenizer/tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("model_max_length", None)
    path.write_text(json.dumps(config))
    model = load_model(folder, device="cpu")
    limit = model.pipe.text_encoder.config.max_position_embeddings
    assert model.encode_prompts(["a red cup"]).embeds.shape[1] == limit


def test_what_the_text_encoder_does_not_read_is_known(folder):
    model = load_model(folder, device="cpu")
    long = "a red cup and a blue cup " * 40
    short, first, second = model.text_read(["a red cup", f"{long} x", f"{long} y"])
    assert short == "a red cup"
    assert first == second
    assert len(first) < len(long)


def test_a_model_with_other_input_channels_is_refused_at_loading(folder):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    UNet2DConditionModel.from_config({**unet.config, "in_channels": 9}).save_pretrained(folder / "unet")
    with pytest.raises(UserError, match=r"must denoise latents of 4 channels, got a U-Net with 9 input channels"):
        load_model(folder, device="cpu")
