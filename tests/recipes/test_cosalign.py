import json

import pytest
import torch

from chat_models import byte_tokenizer, tiny_llama
from valign.data.chats.judged_answers import JudgedPrompt, ResponseLabel, read_judged_prompts
from valign.recipes.cosalign import CosalignConfig, config_pairs, train_cosalign
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.reinforce.config import ReinforceConfig

KNOWN = ("a", "b")


def judged(word, *risks):
    own = frozenset(risks)
    answers = {ResponseLabel(own, True): [f"do {word}"], ResponseLabel(frozenset(), False): ["no"]}
    return JudgedPrompt((("user", f"how to {word}?"),), own, answers)


def write(allowed, draws):
    return f"ok: {' '.join(sorted(allowed))}" if allowed else ""


def test_pairs_follow_the_config_and_share_it():
    made = config_pairs([judged("x", "a"), judged("y")], KNOWN, write, configs=5, seed=0)
    assert sum(made.kinds.values()) == len(made.pairs) == 40  # two prompts, four kinds, five configs, one pair each
    for pair in made.pairs:
        safe, unsafe = pair.safe.messages, pair.unsafe.messages
        assert safe[:-1] == unsafe[:-1]
        system = safe[0]["content"].split() if safe[0]["role"] == "system" else []
        harmful = safe[-2]["content"] == "how to x?"
        assert safe[-1]["content"] == ("no" if harmful and "a" not in system else safe[-1]["content"])
        if not harmful or "a" in system:
            assert safe[-1]["content"].startswith("do")
    assert config_pairs([judged("x", "a")], KNOWN, write, seed=3) == config_pairs([judged("x", "a")], KNOWN, write, seed=3)


def test_supervised_training_shows_no_answer_to_which_another_is_preferred():
    answers = {ResponseLabel(frozenset("b"), False): ["do other"], **judged("x", "a").answers}
    made = config_pairs([JudgedPrompt((("user", "how to x?"),), frozenset("a"), answers)], KNOWN, write, configs=5)
    refused_twice = {pair.safe for pair in made.pairs} & {pair.unsafe for pair in made.pairs}
    assert refused_twice  # a refusal beats another's harm and loses to the steps, where these are open
    assert not refused_twice & set(made.best)
    assert {chat.messages[-1]["content"] for chat in made.best} == {"do x", "no"}


def test_answers_of_one_label_are_counted_and_refused_if_there_are_no_others():
    lone = JudgedPrompt((("user", "q"),), frozenset(), {ResponseLabel(frozenset(), True): ["a"]})
    assert config_pairs([judged("x", "a"), lone], KNOWN, write).silent == 1
    with pytest.raises(ValueError, match="at least two labels to prefer one, got 1 prompts without a pair"):
        config_pairs([lone], KNOWN, write)


def test_sft_then_dpo_run_to_the_end_and_resume(tmp_path):
    tokenizer = byte_tokenizer()
    tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = config_pairs([judged("x", "a"), judged("y", "b"), judged("z")], KNOWN, write)
    config = CosalignConfig(sft_steps=2, sft_learning_rate=1e-3, sft_batch=4, max_tokens=100)
    dpo = ReinforceConfig(steps=2, prompts=4, learning_rate=1e-3, kl=0.1)
    result = train_cosalign(tmp_path / "model", made, tmp_path / "run", parse_tuning("full"), config, dpo, device="cpu")
    assert train_cosalign(tmp_path / "model", made, tmp_path / "run", parse_tuning("full"), config, dpo, device="cpu") == result
    first = json.loads((tmp_path / "run" / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-4)
    with pytest.raises(ValueError, match="cosalign trains whole weights"):
        train_cosalign(tmp_path / "model", made, tmp_path / "x", parse_tuning("lora"), config, dpo)


def test_judged_prompts_are_read_and_bad_ones_refused(tmp_path):
    row = {
        "prompt": "q",
        "risks": ["a"],
        "answers": [{"text": "x", "risks": ["a"], "addressed": 1}, {"text": "no", "risks": [], "addressed": False}],
    }
    path = tmp_path / "j.jsonl"

    def read(**changes):
        path.write_text(json.dumps(row | changes) + "\n")
        return read_judged_prompts(path)

    (found,) = read()
    assert found.answers == {ResponseLabel(frozenset("a"), True): ["x"], ResponseLabel(frozenset(), False): ["no"]}
    for changes, message in (
        ({"prompt": ""}, "row 1: prompt must be a text"),
        (
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]},
            "no system turn, where safety configs go",
        ),
        ({"answers": [{"text": "x", "risks": [], "addressed": 2}]}, r"addressed must be a whole number in \[0, 1\]"),
        ({"answers": [{"risks": []}]}, "answers must be objects with text, risks and addressed"),
        ({"risks": "a"}, "risks must be a list, got text"),
    ):
        with pytest.raises(ValueError, match=message):
            read(**changes)
