"""Building a library with a chat model, fitting and measuring the retriever."""

import json

import numpy as np
import pytest
import yaml

from valign.checks import UserError
from valign.evaluation.bm25 import bm25_scores
from valign.models.language.chat import ScriptedChat
from valign.policy import Guideline, load_policy
from valign.recipes.guidelines import build_library, guideline_lines, split_pairs
from valign.training.tasks.guidelines import GuidelineFitConfig, fit_guidelines

POLICY = load_policy("default")


class Encoder:
    """Random vectors, one per word, summed: texts that share words are near."""

    name, dim, sha256 = "words", 64, "0" * 64

    def encode(self, texts):
        rows = np.stack([sum(self._word(word) for word in text.lower().split()) for text in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def _word(self, word):
        return np.random.default_rng(list(word.encode())).standard_normal(self.dim)


def answer(*lines):
    return json.dumps({"unsafe": True, "guidelines": list(lines)})


def test_a_build_keeps_what_is_new_says_where_it_is_from_and_goes_on_after_a_kill(tmp_path):
    known = next(one.text for one in POLICY.guidelines if one.requests)
    replies = [
        answer("Keep knives at rest: lay them on the table.", known),
        answer("keep knives at rest:  LAY them on the table.", "no title here but long enough"),
        "I cannot answer that.",
        answer("Keep knives at rest: show the chef smiling."),
    ]
    requests = ["a chef with a knife", "a knife on a table", "??", "a happy chef"]
    chat = ScriptedChat(replies[:2])
    with pytest.raises(Exception):  # noqa: B017  # the chat model runs out of answers, as an endpoint that dies
        build_library(chat, requests, POLICY, tmp_path, model="test-model", encoder=Encoder())
    chat = ScriptedChat(replies[2:])
    built = build_library(chat, requests, POLICY, tmp_path, model="test-model", encoder=Encoder())
    assert len(chat.calls) == 2
    assert (built.failed, built.repeated) == (1, 2)
    assert [one.id for one in built.entries] == ["keep-knives-at-rest", "keep-knives-at-rest-2"]
    assert built.entries[0].requests == requests[:2]
    assert built.entries[0].source == "test-model"
    file = (tmp_path / "guidelines.yaml").read_text()
    assert file.startswith("# For review: nothing here is in force.")
    assert [Guideline(**row) for row in yaml.safe_load(file)["guidelines"]] == list(built.entries)


def test_a_build_without_usable_answers_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no usable guideline for 2 of 2"):
        build_library(ScriptedChat(["x", "y"]), ["a", "b"], POLICY, tmp_path, model="m", encoder=Encoder())
    with pytest.raises(UserError, match="must hold a request"):
        build_library(ScriptedChat([]), [" "], POLICY, tmp_path, model="m", encoder=Encoder())


def test_lines_that_quote_answer_or_have_no_title_are_left_out():
    text = answer(
        "Keep it calm: no shouting at all.", "Keep it calm: a red cat on a mat it is.", "short: x", "No title at all in here"
    )
    assert guideline_lines(f"```json\n{text}\n```", "a red cat on a mat") == ["Keep it calm: no shouting at all."]
    assert guideline_lines('{"guidelines": 3}', "x") == []


def test_the_last_requests_are_held_out_and_one_is_always_left():
    library = [Guideline(id="a", text="A: a", requests=["1", "2", "3"]), Guideline(id="b", text="B: b", requests=["4"])]
    assert split_pairs(library) == ([("1", 0), ("4", 1)], [("2", 0), ("3", 0)])


def test_a_fit_learns_which_guideline_belongs_to_a_topic():
    topics = ("knife", "beach", "horse", "money", "grave", "doctor")
    texts = [f"{word} {word} rule" for word in ("blade", "sand", "mare", "coin", "tomb", "nurse")]
    requests = ["photo of {}", "painting of {}", "{} at night", "{} in town"]
    train = [(form.format(topic), number) for number, topic in enumerate(topics) for form in requests[:3]]
    config = GuidelineFitConfig(epochs=30, batch=6, lr=3e-3)
    model, losses = fit_guidelines(train, texts, Encoder(), config)
    scores = model.questions(Encoder(), [requests[3].format(topic) for topic in topics]) @ model.contexts(Encoder(), texts).T
    assert (scores.argmax(1) == np.arange(len(topics))).all()
    assert losses[-1] < 0.5 * losses[0]
    again, _ = fit_guidelines(train, texts, Encoder(), config)
    np.testing.assert_array_equal(again.question_matrix, model.question_matrix)
    with pytest.raises(UserError, match="needs 2 guidelines"):
        fit_guidelines(train, texts[:1], Encoder())
    with pytest.raises(UserError, match="got batch 1 and negatives 0: the loss is always 0"):
        fit_guidelines(train, texts, Encoder(), GuidelineFitConfig(batch=1, negatives=0))


def test_bm25_in_closed_form():
    scores = bm25_scores("red cat", ["a red cat", "a dog", "the red red dog"])
    idf = {"cat": np.log(1 + 2.5 / 1.5), "red": np.log(1 + 1.5 / 2.5)}
    mean = 9 / 3
    first = idf["red"] * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 3 / mean)) + idf["cat"] * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 3 / mean))
    np.testing.assert_allclose(scores, [first, 0.0, idf["red"] * 5 / (2 + 1.5 * (0.25 + 0.75 * 4 / mean))])
