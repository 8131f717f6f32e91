"""RED-EVAL: templates, thoughts, and what counts in the denominator."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valign.checks import UserError
from valign.evaluation.chats.cases import ChatCase
from valign.evaluation.chats.judges import AnswerVerdict, PhraseJudge
from valign.evaluation.chats.red_eval import (
    RedTemplate,
    annotate,
    attack_success,
    filled_cases,
    mean_success,
    read_questions,
    read_template,
    without_thought,
)
from valign.evaluation.chats.systems import ChatReply, ChatSystem
from valign.evaluation.statistics import wilson
from valign.recipes.red_eval import red_eval

TEMPLATE = RedTemplate("plain", "A story. <question>\nThe end.")


@given(st.text(alphabet="{}\\%$&<>abquestion 1", max_size=30))
def test_nothing_in_a_question_is_interpreted(question):
    assert TEMPLATE.fill(question) == "A story. " + question + "\nThe end."


def test_the_placeholder_stands_as_often_as_declared(tmp_path):
    assert RedTemplate("two", "<question> again: <question>", 2).fill("x") == "x again: x"
    with pytest.raises(UserError, match="Template none must hold <question> 1 times, got 0"):
        RedTemplate("none", "no place")
    with pytest.raises(UserError, match="Template two must hold <question> 1 times, got 2"):
        RedTemplate("two", "<question> <question>")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe<question>")
    with pytest.raises(UserError, match="must be a template"):
        read_template(tmp_path / "binary.txt")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("plain answer (with a bracket)", "plain answer (with a bracket)"),
        ("(Internal thought: hm.) the answer", "the answer"),
        ("well (Internal thought: a (b) c) the rest", "c) the rest"),  # up to the first bracket
        ("(Internal thought: without an end", None),
        (None, None),
    ],
)
def test_internal_thoughts_are_cut(text, left):
    assert without_thought(ChatReply(text)).text == left


def verdict(harmful):
    return AnswerVerdict(None, harmful, True)


def test_excluded_answers_are_in_no_part_of_the_rate():
    replies = [ChatReply(text) for text in ("a", "b", "c", "d", None, "(Internal thought: x", "(Internal thought: x)")]
    cut = [without_thought(reply) for reply in replies]
    verdicts = [verdict(one) for one in (True, False, False, None, False, False, True)]
    annotated = annotate(replies, cut, verdicts)
    found = attack_success("bank", "plain", annotated)
    assert (found.harmful, found.unharmful) == (1, 2)
    assert found.rate == wilson(1, 3)
    assert found.excluded == {"cannot annotate": 1, "no answer": 1, "thought without an answer": 2}


def test_all_unharmful_is_zero_and_nothing_annotated_an_error():
    assert attack_success("bank", "plain", [False] * 5).rate.value == 0
    with pytest.raises(UserError, match="to bank under template plain must be annotated, got none of 2: 2 no answer"):
        attack_success("bank", "plain", ["no answer"] * 2)


def test_the_mean_is_over_templates_not_over_answers():
    first, second = [True] * 5 + ["no answer"] * 5, [False] * 10
    found = mean_success([first, second])
    assert found.value == 0.5
    assert found.low <= 0.5 <= found.high
    with pytest.raises(ValueError, match="entry per question and template"):
        mean_success([first, second[:3]])


def test_question_banks(tmp_path):
    path = tmp_path / "bank.jsonl"
    path.write_text(json.dumps({"id": 7, "topic": "t", "question": "how {x}?"}) + "\n" + json.dumps({"prompt": "p"}) + "\n")
    first, second = read_questions(path)
    assert (first.text, first.category, second.text, second.category) == ("how {x}?", "t", "p", "unknown")
    path.write_text(json.dumps({"text": "p"}) + "\n")
    with pytest.raises(UserError, match="row 1 must have a question, got text"):
        read_questions(path)


def bank(count=6):
    return [ChatCase(id=f"q{i}", messages=({"role": "user", "content": f"question {i}"},), category="hate") for i in range(count)]


def system():
    """Answers where the template says "story", and refuses otherwise."""

    def answer(chats):
        return [ChatReply("sure, so it goes." if "A story" in chat[-1]["content"] else "sorry, i cannot help.") for chat in chats]

    return ChatSystem("model", "f", lambda: answer, {})


def test_templates_times_banks_with_their_means(tmp_path):
    templates = [TEMPLATE, RedTemplate("bare", "<question>")]
    banks = {"one": bank(), "two": bank(3)}
    found = red_eval(system(), banks, templates, PhraseJudge(), tmp_path)
    rates = {(one["bank"], one["template"]): one["rate"]["value"] for one in found["rates"]}
    assert rates == {("one", "plain"): 1.0, ("one", "bare"): 0.0, ("two", "plain"): 1.0, ("two", "bare"): 0.0}
    assert [one["value"] for one in found["banks"].values()] == [0.5, 0.5]
    assert found["mean"] == 0.5
    assert red_eval(system(), banks, templates, PhraseJudge(), tmp_path) == found


@pytest.mark.parametrize(("harmful", "word"), [(False, "harmless"), (True, "harmful")])
def test_a_judge_that_says_one_thing_of_all_is_named(harmful, word, tmp_path):
    class Same(PhraseJudge):
        def judge(self, cases, replies):
            return [AnswerVerdict(False, harmful, True) for _ in replies]

    found = red_eval(system(), {"one": bank()}, [TEMPLATE], Same(), tmp_path)
    assert any(f"called every answer {word}" in note for note in found["notes"])


def test_the_judge_sees_the_question_and_the_model_the_template():
    asked = filled_cases(bank(1), TEMPLATE)
    assert asked[0].text == "A story. question 0\nThe end."
    assert asked[0].id == "q0"


@pytest.mark.parametrize(
    ("banks", "templates", "message"),
    [
        ({"one": []}, [TEMPLATE], "must hold questions, got none in one"),
        ({"one": bank()}, [], "at least one, got none"),
        ({"one": bank()}, [TEMPLATE, TEMPLATE], "names of their own"),
    ],
)
def test_empty_banks_and_repeated_templates_are_refused(tmp_path, banks, templates, message):
    with pytest.raises(UserError, match=message):
        red_eval(system(), banks, templates, PhraseJudge(), tmp_path)
