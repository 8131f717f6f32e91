"""Answers on disk: resumed after a kill with the same bytes, refused for another model."""

import pytest

from valign.checks import UserError
from valign.evaluation.chats.answers import ask_all
from valign.evaluation.chats.cases import ChatCase, suite_cases
from valign.evaluation.chats.systems import ChatReply, ChatSystem, asked_one_by_one, check_same_base
from valign.evaluation.suite import EvalPrompt, Suite
from valign.files import write_json
from valign.models.files.adapter_base import chat_folder_fingerprint
from valign.models.language.chat import ChatRefused, ScriptedChat

CASES = [ChatCase(id=f"c{i}", messages=({"role": "user", "content": f"question {i}"},)) for i in range(7)]


def system(answer, fingerprint="a"):
    return ChatSystem("model", fingerprint, lambda: answer, {"max_tokens": 8})


def echo(chats):
    return [ChatReply(f"{chat[-1]['content']} among {len(chats)}") for chat in chats]


def test_a_killed_run_goes_on_with_the_same_answers(tmp_path):
    calls = []

    def dies(chats):
        calls.append(len(chats))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return echo(chats)

    with pytest.raises(KeyboardInterrupt):
        ask_all(system(dies), CASES, tmp_path / "killed", chunk=3)
    resumed = ask_all(system(echo), CASES, tmp_path / "killed", chunk=3)
    assert resumed == ask_all(system(echo), CASES, tmp_path / "whole", chunk=3)
    names = [tmp_path / name / "answers.jsonl" for name in ("killed", "whole")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_finished_run_loads_nothing(tmp_path):
    first = ask_all(system(echo), CASES, tmp_path)
    assert ask_all(system(None), CASES, tmp_path) == first


def test_answers_of_another_model_are_not_taken(tmp_path):
    ask_all(system(echo), CASES, tmp_path)
    with pytest.raises(UserError, match="made with another recipe"):
        ask_all(system(echo, fingerprint="b"), CASES, tmp_path)


def test_an_endpoint_that_takes_a_request_not_has_no_answer():
    def answer(messages):
        if "3" in messages[-1]["content"]:
            raise ChatRefused("no")
        return "yes"

    replies = asked_one_by_one(ScriptedChat(answer))([case.messages for case in CASES])
    assert [reply.text for reply in replies] == ["yes"] * 3 + [None] + ["yes"] * 3


def test_repeated_ids_are_refused(tmp_path):
    with pytest.raises(UserError, match="c0 twice"):
        ask_all(system(echo), [CASES[0], CASES[0]], tmp_path)


def test_a_suites_prompts_become_requests():
    suite = Suite("s", (EvalPrompt("a", "risky words", "hate", "explicit"), EvalPrompt("b", "plain words")))
    first, second = suite_cases(suite)
    assert (first.risky, second.risky, first.text) == (True, False, "risky words")


def folder(path, template="t", **config):
    path.mkdir()
    write_json(path / "config.json", {"model_type": "llama", "hidden_size": 16, **config})
    (path / "chat_template.jinja").write_text(template)
    return path


def test_models_of_different_bases_cannot_be_paired(tmp_path):
    first = folder(tmp_path / "a")
    check_same_base(first, folder(tmp_path / "b"))
    with pytest.raises(UserError, match="hidden_size 16 and 32"):
        check_same_base(first, folder(tmp_path / "c", hidden_size=32))
    with pytest.raises(UserError, match="different chat templates"):
        check_same_base(first, folder(tmp_path / "d", template="other"))
    with pytest.raises(UserError, match="must be a folder with safetensors"):
        chat_folder_fingerprint(first)
