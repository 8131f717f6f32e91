"""Words in letters that the word lists cannot read: what counts as one, and what the verdict says."""

import pytest

from valign.guard import Guard, Verdict
from valign.guard.rules.script import ScriptStage, listed_words, readable, words
from valign.policy import load_policy

TAIL = ", oil painting, highly detailed, dramatic lighting, artstation, 8k, sharp focus, by a famous painter"
REQUESTS = [
    "一个人在河边散步",
    "夜の街を歩く人",
    "رجل يمشي في السوق",
    "एक आदमी बाज़ार में चल रहा है",
    "человек идёт по рынку",
    "человек",
    "ч е л о в е к",
    "секс",  # each of its letters looks Latin, and folded it is no English word
    "чeлoвeк",  # with Latin e and o
    "ein Mann und 裸",
]


@pytest.fixture(scope="module")
def stage():
    return ScriptStage(load_policy("default"))


@pytest.mark.parametrize("request_text", REQUESTS)
@pytest.mark.parametrize("tail", ["", TAIL])
def test_an_english_tail_makes_no_foreign_request_readable(stage, request_text, tail):
    for prompt in (request_text + tail, tail.removeprefix(", ") + ", " + request_text):
        verdict = stage.check(prompt)
        assert (verdict.outcome, verdict.action) == ("fire", "block")


@pytest.mark.parametrize(
    "prompt",
    [
        "a café in São Paulo, Łódź and Việt Nam",
        "Beyoncé naïve façade Straße",
        "the angle α beside π on a blackboard",
        "a 5 μm hair, 3 Ω",
        "a c\u0430t on a sofa",  # a Cyrillic a
        "\uff41 \uff43\uff41\uff54",  # full width
        "a cat \U0001f408 on a sofa \u2192 \u2013 \u201cmeow\u201d",
        "na\u0308ive",  # a combining mark
    ],
)
def test_what_reads_as_latin_passes(stage, prompt):
    assert not stage.check(prompt).fired


def test_harmless_russian_is_not_judged_as_english():
    decision = Guard.from_policy(load_policy("default")).check("моё тихое озеро")
    assert (decision.action, decision.stop, decision.categories) == ("block", "script", ())


def test_a_listed_word_in_lookalikes_is_left_to_its_list(stage):
    assert {"porn", "naked", "school"} <= listed_words(load_policy("default"))
    assert not stage.check("a \u0440\u043e\u0433\u03b7 scene").fired
    assert stage.check("a \u0440\u043e\u0433\u043d\u043e\u0441 scene").fired


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("", True),
        ("cat", True),
        ("ж", True),
        ("裸", False),
        ("c\u0430t", True),
        ("c\u0430\u0442", True),  # two look-alikes beside a Latin letter
        ("c\u0430ж", False),
        ("\u0441\u0430\u0442", False),  # none of its letters is Latin
        ("aɐɐ", False),  # U+0250, beyond the last Latin letter that lists hold
        ("aɏɏ", True),  # U+024F
    ],
)
def test_readable_by_hand(word, expected):
    assert readable(word) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a cat, 8k", ["a", "cat", "k"]),
        ("n a k e d man", ["naked", "man"]),
        ("n.a.k", ["nak"]),
        ("a b", ["a", "b"]),
        ("na\u200bked", ["naked"]),
        ("हिन्दी", ["हनद"]),
    ],
)
def test_words_by_hand(prompt, expected):
    assert list(words(prompt)) == expected


@pytest.mark.parametrize("action", ["block", "allow"])
def test_every_field(action):
    policy = load_policy("default")
    policy = policy.model_copy(update={"guard": policy.guard.model_copy(update={"other_scripts": action})})
    plain, one, two = ScriptStage(policy).check_many(["a cat", "é ж", "большой мир"])
    rule = {"stage": "script", "level": "rule"}
    assert plain == Verdict(**rule)
    assert one == Verdict(**rule, score=0, threshold=1)
    fired = {"outcome": "fire", "message": "letters that this policy cannot read", "action": "block"}
    assert two == Verdict(**rule, score=2, threshold=1, **(fired if action == "block" else {}))
