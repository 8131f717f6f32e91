import json

import pytest
import torch
from torch.testing import assert_close

from valign.checks import UserError
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.value_encoder import (
    ValueConditioning,
    ValueText,
    copy_encoder,
    load_value_encoder,
    save_value_encoder,
)

PRINCIPLES = (ValueText("calm", "calm colours", ("quiet",)), ValueText("no-guns", "guns are considered inappropriate"))
FAMILIES = ["tiny_sd", "tiny_sd_v", "tiny_sdxl"]


@pytest.fixture(params=FAMILIES)
def model(request):
    return load_model(request.getfixturevalue(request.param), device="cpu")


@pytest.fixture
def sd(tiny_sd):
    return load_model(tiny_sd, device="cpu")


def random_change(encoder):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.trained().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_a_fresh_token_is_the_text_encoders_own_state(sd):
    encoder = copy_encoder(sd, PRINCIPLES)
    ids = sd.pipe.tokenizer(["calm colours, a cat"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert_close(encoder.token("calm", ["a cat"]), sd.pipe.text_encoder(ids).pooler_output, rtol=0, atol=0)
    assert sum(p.numel() for p in encoder.trained().values()) == sum(p.numel() for p in sd.pipe.text_encoder.parameters())


def test_sdxl_reads_both_encoders_where_its_unet_does(tiny_sdxl):
    model = load_model(tiny_sdxl, device="cpu")
    encoder = copy_encoder(model, PRINCIPLES)
    embeds = model.encode_prompts(["calm colours, a cat"]).embeds[0]
    end = len(model.pipe.tokenizer("calm colours, a cat").input_ids) - 1
    assert_close(encoder.token("calm", ["a cat"])[0], embeds[end], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_every_trained_parameter_gets_a_gradient_and_the_base_none(model, lora_rank):
    encoder = copy_encoder(model, PRINCIPLES, lora_rank=lora_rank)
    random_change(encoder)  # a LoRA whose B is 0 would leave A without one
    encoder.token("calm", ["a cat", "a dog"]).square().sum().backward()
    trained = encoder.trained()
    without = [name for name, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [name for name in without if "k_proj" not in name or "bias" not in name]  # attention does not feel a key's bias
    assert all(p.grad is None for part in model.text_encoders for p in part.parameters())
    if lora_rank:
        assert all("lora_" in name for name in trained)


def test_a_fresh_lora_changes_no_token(model):
    whole, lora = copy_encoder(model, PRINCIPLES), copy_encoder(model, PRINCIPLES, lora_rank=2, seed=5)
    assert_close(lora.token("calm", ["a cat"]), whole.token("calm", ["a cat"]), rtol=0, atol=0)
    again = copy_encoder(model, PRINCIPLES, lora_rank=2, seed=5).trained()
    assert all(torch.equal(parameter, again[name]) for name, parameter in lora.trained().items())


def test_the_two_texts_are_not_exchangeable(model):
    encoder = copy_encoder(model, (ValueText("a", "calm colours"), ValueText("b", "a cat")))
    assert not torch.allclose(encoder.token("a", ["a cat"]), encoder.token("b", ["calm colours"]))


def test_conditioning_is_the_token_and_then_the_prompt(model):
    encoder = copy_encoder(model, PRINCIPLES)
    text = model.encode_prompts(["a cat", "a dog"])
    ids = encoder.tokenize(encoder.principle("calm"), ["a cat", "a dog"])
    cond = ValueConditioning(text, ids, encoder)
    assert cond.embeds.shape == (2, text.embeds.shape[1] + 1, text.embeds.shape[2])
    assert torch.equal(cond.embeds[:, 1:], text.embeds)
    assert_close(cond.embeds[:, 0], encoder.token("calm", ["a cat", "a dog"]), rtol=0, atol=0)
    twice = cond.repeat(2)
    assert len(twice) == 4
    assert_close(twice.embeds, torch.cat([cond.embeds] * 2), rtol=0, atol=0)
    assert_close(twice.select([3]).embeds, cond.embeds[1:], rtol=1e-5, atol=1e-6)
    if text.pooled is not None:
        assert torch.equal(twice.pooled, text.pooled.repeat(2, 1))
    with encoder.off():
        assert torch.equal(cond.embeds, text.embeds)  # without the token the base model's own input
    assert cond.embeds.shape[1] == text.embeds.shape[1] + 1
    with pytest.raises(ValueError, match="one value text per prompt, got 1 for 2"):
        ValueConditioning(text, ids[:1], encoder)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_saving_keeps_the_tokens_and_writes_nothing_of_the_base(model, lora_rank, tmp_path):
    encoder = copy_encoder(model, PRINCIPLES, layout="padded", lora_rank=lora_rank)
    random_change(encoder)
    save_value_encoder(tmp_path / "values", encoder, metadata={"step": 7})
    assert sorted(path.name for path in (tmp_path / "values").iterdir()) == ["value_encoder.json", "value_encoder.safetensors"]
    record = json.loads((tmp_path / "values" / "value_encoder.json").read_text())
    assert record["parameters"] == sum(p.numel() for p in encoder.trained().values())
    assert record["metadata"] == {"step": 7}
    for path in (tmp_path, tmp_path / "values", tmp_path / "values" / "value_encoder.safetensors"):
        loaded = load_value_encoder(path, model)
        assert torch.equal(loaded.token("no-guns", ["a cat"]), encoder.token("no-guns", ["a cat"]))
        assert loaded.principles == PRINCIPLES
        assert loaded.layout == "padded"
        assert not any(p.requires_grad for p in loaded.parameters())


def test_another_base_model_is_refused(sd, tiny_sd_v, tmp_path):
    save_value_encoder(tmp_path, copy_encoder(sd, PRINCIPLES))
    with pytest.raises(UserError, match=r"was trained for base model .* Use that base model"):
        load_value_encoder(tmp_path, load_model(tiny_sd_v, device="cpu"))


def test_damaged_files_are_named(sd, tmp_path):
    save_value_encoder(tmp_path, copy_encoder(sd, PRINCIPLES))
    weights = tmp_path / "value_encoder.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"value_encoder\.safetensors could not be read"):
        load_value_encoder(tmp_path, sd)
    save_value_encoder(tmp_path / "lora", copy_encoder(sd, PRINCIPLES, lora_rank=1))
    weights.write_bytes((tmp_path / "lora" / "value_encoder.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"does not fit its value_encoder\.json"):
        load_value_encoder(tmp_path, sd)
    (tmp_path / "value_encoder.json").write_text("{}")
    with pytest.raises(UserError, match="must be of format 1"):
        load_value_encoder(tmp_path, sd)


def test_a_number_that_is_none_is_not_saved(sd, tmp_path):
    encoder = copy_encoder(sd, PRINCIPLES)
    with torch.no_grad():
        next(iter(encoder.trained().values())).fill_(float("nan"))
    with pytest.raises(UserError, match="must be finite, got NaN"):
        save_value_encoder(tmp_path, encoder)


def test_principles_are_found_by_id_text_and_alias_and_one_at_a_time(sd, as_in_use):
    encoder = copy_encoder(sd, PRINCIPLES)
    assert {encoder.principle(name).id for name in ("calm", "Calm colours", "QUIET")} == {"calm"}
    with pytest.raises(UserError, match="principle must be one of calm, no-guns; got 'loud'"):
        encoder.principle("loud")
    with pytest.raises(UserError, match="An image takes one principle"):
        encoder.principle(["calm", "no-guns"])


def test_the_fingerprint_is_of_weights_layout_and_principles(sd):
    same, other = copy_encoder(sd, PRINCIPLES), copy_encoder(sd, PRINCIPLES)
    assert same.fingerprint() == other.fingerprint()
    assert copy_encoder(sd, PRINCIPLES, layout="padded").fingerprint() != same.fingerprint()
    assert copy_encoder(sd, PRINCIPLES[:1]).fingerprint() != same.fingerprint()
    random_change(other)
    assert other.fingerprint() != same.fingerprint()


def test_refuses_widths_that_do_not_fit(sd):
    sd.denoiser.register_to_config(cross_attention_dim=8)
    with pytest.raises(UserError, match="its text encoders are 32 wide, its cross-attention 8"):
        copy_encoder(sd, PRINCIPLES)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"principles": ()}, "one or more of distinct ids"),
        ({"principles": (PRINCIPLES[0], PRINCIPLES[0])}, "one or more of distinct ids"),
        ({"layout": "loose"}, "must be one of reference, padded; got 'loose'"),
        ({"lora_rank": 0}, r"ValueEncoder\.lora_rank must be in \[1, inf\)"),
    ],
)
def test_refuses_bad_options(sd, options, text):
    with pytest.raises(ValueError, match=text):
        copy_encoder(sd, **{"principles": PRINCIPLES, **options})
