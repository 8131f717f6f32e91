"""End-of-text states against one prompt at a time, written out; and the identity of a model's text encoders."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from valign.models.diffusion.loading import load_model
from valign.models.diffusion.prompt_states import end_states, prompt_states, state_width, text_fingerprint

PROMPTS = ["a red man", "", "a photo of the blue woman in a painting", "a " * 200]


def one_by_one(model, prompt):
    """The pipeline's own tokens, all 77 of them; the state where the text ends, of each encoder."""
    parts = []
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        rows = tokenizer([prompt], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        length = min(len(tokenizer(prompt).input_ids), 77)  # with start and end
        states = encoder(rows, output_hidden_states=True).hidden_states[-1]
        network = getattr(encoder, "text_model", encoder)
        parts.append(network.final_layer_norm(states)[0, length - 1])
    return torch.cat(parts)


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl"])
def test_states_are_those_of_each_prompt_alone_after_the_final_norm(request, family):
    model = load_model(request.getfixturevalue(family), device="cpu")
    states = prompt_states(model, PROMPTS)
    assert states.shape == (4, state_width(model))
    assert states.dtype == torch.float32
    with torch.no_grad():
        assert_close(states, torch.stack([one_by_one(model, prompt) for prompt in PROMPTS]), rtol=1e-4, atol=1e-5)
    assert prompt_states(model, []).shape == (0, state_width(model))


def test_chunks_do_not_change_a_state(tiny_sd, monkeypatch):
    model = load_model(tiny_sd, device="cpu")
    whole = prompt_states(model, PROMPTS)
    monkeypatch.setattr("valign.models.diffusion.prompt_states.CHUNK", 3)
    assert_close(prompt_states(model, PROMPTS), whole, rtol=1e-5, atol=1e-6)


def test_padding_with_the_end_token_does_not_move_the_end():
    states = torch.arange(12.0).view(2, 3, 2)
    ids = torch.tensor([[0, 9, 9], [0, 5, 9]])
    assert end_states(states, ids, 9).tolist() == [[2.0, 3.0], [10.0, 11.0]]


def test_the_fingerprint_is_of_the_text_encoders_alone(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "sd")
    original = text_fingerprint(load_model(tiny_sd, device="cpu"))
    for part, same in (("unet", True), ("text_encoder", False)):
        weights = next((folder / part).glob("*.safetensors"))
        save_file({name: tensor + 0.5 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
        assert (text_fingerprint(load_model(folder, device="cpu")) == original) == same
