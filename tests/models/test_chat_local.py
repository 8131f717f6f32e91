"""A chat model from a folder: a real transformers model in miniature, random weights, bytes as tokens."""

import shutil

import pytest
import torch

from chat_models import byte_tokenizer, tiny_llama
from valign.checks import UserError
from valign.models.language.chat import ChatModel, ChatRefused
from valign.models.language.local import LocalChat

ASK = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Say yes."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = byte_tokenizer()
    path = tmp_path_factory.mktemp("chat")
    tiny_llama(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def chat(folder):
    return LocalChat(folder, device="cpu", max_tokens=8)


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_answers_the_same_question_the_same_way(chat):
    assert isinstance(chat, ChatModel)
    first = chat.complete(ASK)
    state = torch.random.get_rng_state()
    assert first == chat.complete(ASK, schema={"type": "object"})
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_answer_is_what_the_model_says_after_the_template(folder, chat, tokenizer):
    """By hand: the likeliest byte after the rendered text, eight times."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    text = "<|start|>system\nAnswer briefly.<|end|><|start|>user\nSay yes.<|end|><|start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    length = ids.shape[1]
    for _ in range(8):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert chat.complete(ASK) == tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip()


def test_draws_are_seeded(folder):
    def say(seed):
        return LocalChat(folder, device="cpu", max_tokens=8, temperature=1.0, seed=seed).complete(ASK)

    assert say(1) == say(1)
    assert len({say(seed) for seed in range(4)}) > 1


def test_refuses_what_does_not_fit_its_context(chat):
    with pytest.raises(ChatRefused, match=r"must have room for \d+ tokens and 8 of answer, got 128"):
        chat.complete([{"role": "user", "content": "a" * 200}])


def test_pickles_and_other_folders_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"must be a folder with config\.json"):
        LocalChat(tmp_path)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="has no safetensors file, and pickles are never opened"):
        LocalChat(copy)
    (copy / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="could not be loaded"):
        LocalChat(copy)


def test_a_model_without_a_chat_template_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template, so it is not a chat model"):
        LocalChat(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 3.0}, "temperature must be in"),
        ({"max_tokens": 0}, "max_tokens must be in"),
        ({"dtype": "int3"}, "dtype must be"),
    ],
)
def test_refuses_bad_settings(folder, change, message):
    with pytest.raises(ValueError, match=message):
        LocalChat(folder, **change)
