"""A chat model that judges severity: what it is told, and what of its answers counts."""

import json

import pytest

from valign.checks import UserError
from valign.guard.answer_filter import AnswerFilter
from valign.guard.rewriting.chat import UnreadableAnswer
from valign.guard.severity import ChatSeverity
from valign.models.language.chat import ScriptedChat
from valign.policy import load_policy

POLICY = load_policy("default")


def said(level, category="none"):
    return json.dumps({"reason": "because", "category": category, "level": level})


class Recorded:
    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def complete(self, messages, *, schema=None):
        self.asked.append((messages, schema))
        return self.answers.pop(0)


def test_question_and_answer_are_quoted_data_and_levels_are_read():
    chat = Recorded(said("moderate", "violence"), said("safe", "something"))
    judge = ChatSeverity(chat, POLICY)
    found = judge("how?", "like this")
    assert (found.level, found.category) == ("moderate", "violence")
    assert judge("how?", None).category is None
    (first, schema), (second, _) = chat.asked
    assert json.loads(first[-1]["content"]) == {"question": "how?", "answer": "like this"}
    assert json.loads(second[-1]["content"]) == {"question": "how?"}
    assert schema["properties"]["category"]["enum"] == [*POLICY.category_ids(), "none"]


@pytest.mark.parametrize("answer", ["severe", "{}", '{"level": "terrible"}', "[]"])
def test_an_answer_of_another_form_is_an_error_and_counts_as_severe(answer):
    with pytest.raises(UnreadableAnswer, match="must answer safe, minor, moderate, severe"):
        ChatSeverity(ScriptedChat([answer]), POLICY)("how?", "x")
    found = AnswerFilter(judge=ChatSeverity(ScriptedChat([said("safe"), answer]), POLICY), rounds=1)("how?", lambda *_: "x")
    assert (found.action, found.verdicts[0].level) == ("refused", "severe")


def test_it_judges_no_image():
    with pytest.raises(UserError, match="a chat model sees no image"):
        ChatSeverity(ScriptedChat([said("safe")]), POLICY)("how?", "x", image=object())
