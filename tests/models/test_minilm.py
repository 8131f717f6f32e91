"""The plain-tensor encoder against transformers' BertModel, and its windows."""

import numpy as np
import pytest
import torch

from valign.checks import UserError
from valign.models.encoders import minilm
from valign.models.encoders.minilm import BATCH, MAX_TOKENS, MiniLM, RememberingEncoder, minilm_folder, pool


@pytest.fixture(scope="module")
def encoder():
    return MiniLM()


def test_agrees_with_transformers(encoder):
    from transformers import BertModel

    bert = BertModel.from_pretrained(minilm_folder(), use_safetensors=True, local_files_only=True).eval()
    tokens = encoder.tokenize(["a cat", "two dogs running in a wide green field"])
    with torch.no_grad():
        theirs = bert(input_ids=tokens.ids, attention_mask=tokens.mask.long()).last_hidden_state
    ours = encoder.lower(tokens, 6)
    torch.testing.assert_close(ours[tokens.mask], theirs[tokens.mask], rtol=1e-4, atol=2e-5)


def test_vectors_have_unit_length_and_know_what_is_alike(encoder):
    cat, kitten, bridge = encoder.encode(["a cat on a sofa", "a kitten lying on a couch", "a steel bridge"])
    assert float(cat @ cat) == pytest.approx(1.0, abs=1e-5)
    assert cat @ kitten > 0.6 > cat @ bridge


def test_a_batch_gives_what_each_text_gives(encoder):
    texts = ["a cat", "a very long sentence about nothing in particular, told slowly", "b"]
    np.testing.assert_allclose(encoder.encode(texts), np.concatenate([encoder.encode([text]) for text in texts]), atol=1e-5)
    assert encoder.encode([]).shape == (0, 384)


def test_what_was_encoded_is_not_encoded_again(encoder, monkeypatch):
    asked, plain = [], encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda texts: (asked.append(list(texts)), plain(texts))[1])
    remembering = RememberingEncoder(encoder)
    first, again = remembering.encode(["a cat", "a dog", "a cat"]), remembering.encode(["a dog", "a boat"])
    assert asked == [["a cat", "a dog"], ["a boat"]]
    np.testing.assert_array_equal(first[[0, 1]], first[[2, 1]])
    np.testing.assert_allclose(again, plain(["a dog", "a boat"]), atol=1e-5)


def test_a_long_text_has_overlapping_windows(encoder):
    tokens = encoder.tokenize(["short", "word " * 300])
    assert tokens.owner[:2] == (0, 1)
    assert len(tokens.owner) == 4  # 300 words in windows of 126 that share 32: starts 0, 94 and 188
    assert tokens.ids.shape[1] == MAX_TOKENS


def test_batches_hold_every_window_once_and_little_padding(encoder):
    texts = ["a cat", "word " * 300, "", *(f"{n} red boats on {'a ' * n}lake" for n in range(60))]
    batches = list(encoder.batches(texts))
    whole = encoder.tokenize(texts)
    owners = [owner for tokens in batches for owner in tokens.owner]
    assert sorted(owners) == sorted(whole.owner)
    assert sum(int(tokens.mask.sum()) for tokens in batches) == int(whole.mask.sum())
    assert all(tokens.ids.numel() <= max(BATCH, MAX_TOKENS) for tokens in batches)
    assert sum(tokens.ids.numel() for tokens in batches) < 1.2 * int(whole.mask.sum())
    assert list(encoder.batches([])) == []


def test_eight_bits_say_nearly_the_same(encoder):
    tokens = encoder.tokenize(["a cat on a sofa", "two dogs running in a wide green field"])
    plain, quick = (pool(encoder.lower(tokens, 6, quick=quick), tokens.mask) for quick in (False, True))
    assert (plain * quick).sum(1).min() > 0.995


def test_refuses_a_folder_without_weights(tmp_path):
    with pytest.raises(UserError, match=r"must hold model\.safetensors"):
        MiniLM(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_refuses_a_package_whose_files_are_others(file, tmp_path, monkeypatch):
    for path in minilm_folder().iterdir():
        if path.is_file():
            (tmp_path / path.name).symlink_to(path)
    changed = (tmp_path / file).read_bytes() + b" "
    (tmp_path / file).unlink()
    (tmp_path / file).write_bytes(changed)
    monkeypatch.setattr(minilm, "minilm_folder", lambda: tmp_path)
    with pytest.raises(UserError, match=rf"{file} must have SHA-256 \w{{64}}, got \w{{64}}\. Reinstall"):
        MiniLM()
