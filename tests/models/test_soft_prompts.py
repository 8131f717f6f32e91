"""Token ids and vectors through the text encoder are what the pipeline makes of the same text."""

import pytest
import torch
from torch.testing import assert_close

from valign.checks import UserError
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.soft_prompts import encode_ids, padded_ids, token_vectors, tokens_read

TEXT = "a red photo of the man"


@pytest.fixture(scope="module")
def model(tiny_sd):
    return load_model(str(tiny_sd), device="cpu")


def ids_of(model, text):
    return model.tokenizers[0](text).input_ids[1:-1]


def test_ids_give_what_the_text_gives(model):
    with torch.no_grad():
        found = encode_ids(model, padded_ids(model, [ids_of(model, TEXT)]))
    assert_close(found.embeds, model.encode_prompts([TEXT]).embeds)


def test_more_ids_than_are_read_are_cut(model):
    rows = padded_ids(model, [[5] * 200])
    assert rows.shape == (1, tokens_read(model)) == (1, 77)
    assert rows[0, -1] == model.tokenizers[0].eos_token_id


def test_own_vectors_change_nothing_and_gradients_reach_their_places_alone(model):
    ids = ids_of(model, TEXT)
    vectors = token_vectors(model)[ids][None].requires_grad_(True)
    rows, places = padded_ids(model, [ids]), range(1, len(ids) + 1)
    found = encode_ids(model, rows, vectors, places).embeds
    assert_close(found.detach(), model.encode_prompts([TEXT]).embeds)
    (early,) = torch.autograd.grad(
        found[0, 3] @ torch.arange(32.0), vectors
    )  # the encoder is causal: place 3 has read the first three tokens
    assert early[0, :3].abs().sum(dim=1).min() > 0
    assert early[0, 3:].abs().sum() == 0


def test_the_encoder_is_left_as_it_was(model):
    before = model.encode_prompts([TEXT]).embeds
    encode_ids(model, padded_ids(model, [[5, 6]]), torch.zeros(1, 1, 32), [1])
    assert_close(model.encode_prompts([TEXT]).embeds, before, rtol=0, atol=0)


def test_two_text_encoders_are_refused(tiny_sdxl):
    with pytest.raises(UserError, match="must have one text encoder for an optimization of tokens, got 2"):
        token_vectors(load_model(str(tiny_sdxl), device="cpu"))
