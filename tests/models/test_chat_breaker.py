"""Closed, open, half open: a clock by hand, and a model that fails when told to."""

import threading
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valign.checks import UserError
from valign.models.language.breaker import CircuitBreaker
from valign.models.language.chat import ChatModel, ChatRefused, ChatUnavailable

ASK = [{"role": "user", "content": "hello"}]


class Moody:
    """Raises ``mood``, or answers."""

    def __init__(self):
        self.mood, self.asked, self.schemas = None, 0, []

    def complete(self, messages, *, schema=None):
        self.asked += 1
        self.schemas.append(schema)
        if self.mood is not None:
            raise self.mood
        return "hello yourself"


def make(failures=3, rest=10.0):
    model, now = Moody(), [100.0]
    return model, now, CircuitBreaker(model, failures=failures, rest=rest, clock=lambda: now[0])


def ask(breaker):
    try:
        return breaker.complete(ASK)
    except UserError as error:
        return type(error)


def test_closed_it_passes_questions_and_schemas_on():
    model, _, breaker = make()
    assert isinstance(breaker, ChatModel)
    assert breaker.complete(ASK, schema={"type": "object"}) == "hello yourself"
    assert model.schemas == [{"type": "object"}]


def test_it_opens_after_failures_in_a_row_only():
    model, _, breaker = make(failures=3)
    for mood in (ChatUnavailable(), ChatUnavailable(), None, ChatUnavailable(), ChatUnavailable()):
        model.mood = mood
        ask(breaker)
    assert breaker.state == "closed"
    ask(breaker)
    assert breaker.state == "open"


def test_open_it_asks_nobody_and_says_when_it_will():
    model, now, breaker = make(failures=1, rest=10.0)
    model.mood = ChatUnavailable()
    ask(breaker)
    now[0] += 4
    with pytest.raises(ChatUnavailable, match=r"failed 1 times in a row and is left alone for another 6 s\. Look into"):
        breaker.complete(ASK)
    assert model.asked == 1


@pytest.mark.parametrize(("mood", "after"), [(None, "closed"), (ChatUnavailable(), "open"), (ChatRefused(), "closed")])
def test_half_open_one_question_decides(mood, after):
    model, now, breaker = make(failures=2, rest=10.0)
    model.mood = ChatUnavailable()
    ask(breaker), ask(breaker)
    now[0] += 10
    assert breaker.state == "half-open"
    model.mood = mood
    ask(breaker)
    assert breaker.state == after


def test_half_open_a_second_question_must_wait_for_the_first():
    _, now, breaker = make(failures=1, rest=10.0)
    began, go = threading.Event(), threading.Event()

    class Slow:
        def complete(self, messages, *, schema=None):
            began.set()
            go.wait(5)
            return "at last"

    breaker.chat.mood = ChatUnavailable()
    ask(breaker)
    now[0] += 11
    breaker.chat = Slow()
    answers = []
    trial = threading.Thread(target=lambda: answers.append(breaker.complete(ASK)))
    trial.start()
    assert began.wait(5)
    assert ask(breaker) is ChatUnavailable
    go.set()
    trial.join(5)
    assert (answers, breaker.state) == (["at last"], "closed")


@given(st.lists(st.tuples(st.sampled_from(["good", "down", "refused", "bug"]), st.floats(0, 15)), max_size=30))
def test_it_agrees_with_a_counter_by_hand(events):
    """The plain transcription: a row of failures, and since when."""
    model, now, breaker = make(failures=2, rest=10.0)
    row, since, asked = 0, 0.0, 0
    for what, wait in events:
        now[0] += wait
        model.mood = {"good": None, "down": ChatUnavailable(), "refused": ChatRefused(), "bug": KeyError()}[what]
        goes_through = row < 2 or now[0] - since >= 10.0
        with suppress(UserError, KeyError):
            breaker.complete(ASK)
        if goes_through:
            asked, since = asked + 1, now[0]
            row = row + 1 if what == "down" else 0
        assert model.asked == asked
        assert (breaker.state == "closed") == (row < 2)


@pytest.mark.parametrize(
    ("change", "message"), [({"failures": 0}, r"failures must be in \[1"), ({"rest": 0.0}, r"rest must be in \(0")]
)
def test_refuses_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        CircuitBreaker(Moody(), **change)
