"""Many chats at once say what each would say alone; nothing is cut unseen; model and tokenizer must match."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch

from chat_models import byte_tokenizer, tiny_llama
from valign.checks import UserError
from valign.evaluation.chats.systems import local_system
from valign.files import read_json, write_json
from valign.models.files.adapter_base import _warn, chat_record
from valign.models.files.adapter_files import public_record
from valign.models.language.generation import answer_chats, left_padded
from valign.models.language.loading import load_chat
from valign.worlds.chat import adapter_folder, model_folder

CHATS = [[{"role": "user", "content": text}] for text in ("a", "Say yes, please.", "no <|end|> no", "b" * 40, "c d")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer, path = byte_tokenizer(), tmp_path_factory.mktemp("chat")
    model = tiny_llama(tokenizer, layers=2)
    model.generation_config.temperature, model.generation_config.do_sample = 1.5, True  # the folder's defaults must not apply
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def chat(folder):
    return load_chat(folder, device="cpu", dtype="float32")


def alone(chat, messages, count):
    """By hand, without cache and padding: the likeliest token, up to an end mark."""
    prompt = chat.renderer.prompt(messages)
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(chat.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in chat.renderer.stop_ids:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_answers_are_those_of_each_chat_alone_and_in_order(chat, batch_size):
    found = answer_chats(chat, CHATS, max_tokens=9, batch_size=batch_size)
    assert [answer.ids for answer in found] == [alone(chat, messages, 9) for messages in CHATS]


def test_rows_end_at_their_own_end_marks(chat):
    """With bytes that the model likes as further end marks, rows end at different times; the others go on as before."""
    usual = answer_chats(chat, CHATS, max_tokens=12)
    stops = frozenset({usual[0].ids[1], usual[1].ids[4]}) | chat.renderer.stop_ids
    before, chat.renderer.stop_ids = chat.renderer.stop_ids, stops
    try:
        found = answer_chats(chat, CHATS, max_tokens=12)
        assert [answer.ids for answer in found] == [alone(chat, messages, 12) for messages in CHATS]
        for answer in found:
            assert answer.finish == ("stop" if answer.ids[-1] in stops else "length")
            assert not set(answer.ids[:-1]) & stops
        assert len({len(answer.ids) for answer in found}) > 1
    finally:
        chat.renderer.stop_ids = before


def test_draws_are_seeded_and_from_the_models_own_distribution(chat):
    first = answer_chats(chat, CHATS, max_tokens=6, temperature=1.0, seed=3)
    assert first == answer_chats(chat, CHATS, max_tokens=6, temperature=1.0, seed=3)
    assert first != answer_chats(chat, CHATS, max_tokens=6, temperature=1.0, seed=4)
    cold = answer_chats(chat, CHATS, max_tokens=6, temperature=1e-4, seed=3)
    assert cold == answer_chats(chat, CHATS, max_tokens=6)


def test_padding_stands_left_and_its_mask_comes_from_the_lengths():
    ids, mask = left_padded([[5, 6, 7], [0]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_chat_that_does_not_fit_is_refused_not_cut(chat):
    with pytest.raises(UserError, match=r"must have room for \d+ tokens of chat and 100 of answer, got 128"):
        answer_chats(chat, CHATS, max_tokens=100)
    assert answer_chats(chat, []) == []


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(folder, tmp_path):
    byte_tokenizer(additional_special_tokens=["<|start|>", "<|more|>"]).save_pretrained(tmp_path)
    tiny_llama(byte_tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="must have ids below the model's 258 embeddings, got ids up to 258"):
        load_chat(tmp_path, device="cpu")


def test_an_end_id_that_is_an_ordinary_word_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model = tiny_llama(tokenizer)
    model.config.eos_token_id = model.generation_config.eos_token_id = 65
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="must have an eos_token_id that is a special token of the tokenizer, got 65"):
        load_chat(tmp_path, device="cpu")


def test_an_adapter_changes_the_answers_and_another_models_adapter_is_refused(folder, chat, tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    wrapped = get_peft_model(tiny_llama(byte_tokenizer(), layers=2), lora)
    wrapped.save_pretrained(tmp_path / "mine")
    adapted = load_chat(folder, adapter=tmp_path / "mine", device="cpu")
    ids = torch.tensor([chat.renderer.prompt(CHATS[0])])
    assert not torch.allclose(adapted.model(ids).logits, chat.model(ids).logits)
    other = get_peft_model(tiny_llama(byte_tokenizer(), layers=3), lora)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="must be an adapter for the model in"):
        load_chat(folder, adapter=tmp_path / "other", device="cpu")
    with pytest.raises(UserError, match=r"must be a folder with adapter_config\.json and adapter_model\.safetensors, got none"):
        load_chat(folder, adapter=tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("other", "says"),
    [({"base_fingerprint": "f" * 64}, r"base model tiny ffffffffffff, not"), ({"family": "gpt2"}, "family gpt2, not llama")],
)
def test_an_adapter_of_another_chat_model_is_refused_unless_told_otherwise(folder, tmp_path, caplog, other, says):
    """Its tensors fit: only its record tells."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(tiny_llama(byte_tokenizer(), layers=2), LoraConfig(r=2, target_modules=["v_proj"]))
    wrapped.save_pretrained(tmp_path / "mine")
    _warn.cache_clear()
    load_chat(folder, adapter=tmp_path / "mine", device="cpu")
    assert "has no record of its base model, family: whether it was made for" in caplog.text
    caplog.clear()
    own = chat_record(folder) | {"base": "tiny"}
    write_json(tmp_path / "mine" / "valign.json", own)
    load_chat(folder, adapter=tmp_path / "mine", device="cpu")
    assert not caplog.records
    write_json(tmp_path / "mine" / "valign.json", own | other)
    for load in (load_chat, partial(local_system, "after")):  # before anything is asked
        with pytest.raises(UserError, match=rf"was made for another model than .*: {says}.*use it anyway \(--anyway\)"):
            load(folder, adapter=tmp_path / "mine")
    load_chat(folder, adapter=tmp_path / "mine", device="cpu", anyway=True)
    assert "It is used anyway." in caplog.text


def test_the_bundled_adapter_names_the_bundled_base():
    assert read_json(adapter_folder() / "valign.json") == public_record(chat_record(model_folder("base")))


def test_a_base_in_four_bits_needs_its_package(folder, monkeypatch):
    from valign.models.language import loading

    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(UserError, match=r"needs the package bitsandbytes, which is missing\. pip install"):
        load_chat(folder, device="cpu", four_bit=True)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_base_in_four_bits_has_its_linear_layers_so(folder):
    chat = load_chat(folder, device="cpu", dtype="float32", four_bit=True)
    layer = chat.model.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == torch.uint8
    assert chat.model.model.embed_tokens.weight.dtype == torch.float32
