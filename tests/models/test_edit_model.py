"""The editing model's words and file."""

import pytest
import torch

from valign.checks import UserError
from valign.guard.rewriting.learned_editor import SHIPPED_EDITS
from valign.models.encoders.minilm import MiniLM
from valign.models.heads.edit_model import EditModel, form, load_edit_model, pieces_of, save_edit_model, word_spans


@pytest.fixture(scope="module")
def shipped():
    return load_edit_model(SHIPPED_EDITS)


def test_words_and_their_forms():
    text = "the man's dog, well-known"
    assert [text[start:end] for start, end in word_spans(text)] == ["the", "man", "dog", "well", "known"]
    assert [form(word) for word in ("sing", "singing", "walked", "red", "slowly", "dogs", "is")] == [
        "",
        "ing",
        "ed",
        "",
        "ly",
        "s",
        "",
    ]


def test_pieces_of_words_by_place():
    assert pieces_of([(0, 3), (4, 9)], [(0, 0), (0, 2), (2, 3), (4, 9), (9, 10), (0, 0)]) == {0: [1, 2], 1: [3]}


def test_the_shipped_model_is_small_and_has_a_tag_per_word(shipped):
    assert SHIPPED_EDITS.stat().st_size < 25 * 2**20
    assert (SHIPPED_EDITS.parent / "CARD.md").read_text().count(shipped.sha256) == 1
    prompt = "an oil painting of a man stabbing another man in a quiet garden"
    tags = shipped.tags(MiniLM(), prompt)
    words = [prompt[tag.start : tag.end] for tag in tags]
    assert words == prompt.split()
    by_word = dict(zip(words, tags))
    assert by_word["stabbing"].change > 0.5 > by_word["garden"].change
    assert by_word["stabbing"].category == "violence"


def test_a_long_prompt_is_tagged_to_its_end(shipped):
    prompt = "a quiet garden " * 70 + "and a man stabbing another man"
    tags = shipped.tags(MiniLM(), prompt)
    assert len(tags) == len(prompt.split())
    assert max(tags, key=lambda tag: tag.change).start > len(prompt) - 30


def test_fills_are_probabilities_of_harmless_words(shipped):
    scores = shipped.fill(MiniLM(), "a [MASK] dog in a [MASK]", ["cruel", "ruin"])
    assert scores.shape == (2, len(shipped.settings.vocabulary))
    assert torch.allclose(scores.exp().sum(1), torch.ones(2), atol=1e-4)
    assert not {"naked", "child", "blood"} & set(shipped.settings.vocabulary)


def test_the_words_that_may_be_filled_in_are_looked_up_once(monkeypatch):
    model, encoder, asked = load_edit_model(SHIPPED_EDITS), MiniLM(), []
    plain = encoder.embeddings
    monkeypatch.setattr(encoder, "embeddings", lambda words: (asked.append(len(words)), plain(words))[1])
    first, again = (model.fill(encoder, "a [MASK] dog", ["cruel"]) for _ in range(2))
    assert asked == [len(model.settings.vocabulary)]
    assert torch.equal(first, again)


def test_the_file_comes_back(shipped, tmp_path):
    sha = save_edit_model(shipped, tmp_path / "m.safetensors")
    again = load_edit_model(tmp_path / "m.safetensors")
    assert again.sha256 == sha == shipped.sha256
    assert again.settings == shipped.settings


def test_bad_files_are_refused(shipped, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_edit_model(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(UserError, match="could not be read"):
        load_edit_model(tmp_path / "bad")
    wrong = EditModel(shipped.settings, {**shipped.weights, "tag.weight": torch.zeros(2, 384)})
    save_edit_model(wrong, tmp_path / "wrong")
    with pytest.raises(UserError, match="do not fit its settings"):
        load_edit_model(tmp_path / "wrong")
