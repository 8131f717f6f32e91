"""The intent by rules: each list of words on its own, what is quoted, and what stands beside a sign."""

import pytest

from valign.guard import Verdict
from valign.guard.rules.intention import MOST_PARTS, IntentionRules
from valign.policy import IntentionWords, load_policy

WORDS = IntentionWords(
    prohibition=["no", "do not"],
    signage=["sign", "poster"],
    education=["warning", "museum"],
    depiction=["photo of"],
    joints=["next", "Next to", "with"],
    unexcused=["hate", "slur"],
)


@pytest.mark.parametrize(
    ("prompt", "intent"),
    [
        ("no dogs", "harmful"),  # nothing carries it
        ("a warning of dogs", "harmful"),
        ("a sign with a dog", "harmful"),
        ("a photo of a sign, no dogs", "harmful"),
        ("a photo of a warning sign", "harmful"),
        ("a sign, no dogs", "prohibition"),
        ("a POSTER: Do Not run", "prohibition"),
        ("a warning sign, no dogs", "prohibition"),
        ("a warning sign", "education"),
        ("a sign that says 'no dogs'", "prohibition"),
        ("a sign that says 'museum of dogs'", "education"),
        ("a sign that says \u201cno dogs\u201d", "prohibition"),
        ('a sign with "says no" "cats here"', "prohibition"),
        ('a "no dogs"sign', "prohibition"),
        ("a sign that says 'photo of a dog', no dogs", "prohibition"),  # quoted: on the sign, not asked for
        ("'a small sign' no dogs", "harmful"),  # a carrier that is only quoted
        ("the dogs' sign, it's a dog's", "harmful"),  # apostrophes quote nothing
    ],
)
def test_the_intent(prompt, intent):
    rules = IntentionRules(WORDS)
    assert rules.intent(prompt) == intent
    fires = "fire" if intent == "harmful" else "pass"
    expected = Verdict(stage="intention", level="intention", outcome=fires, rule=intent, message=f"the intent reads as {intent}")
    assert rules.judge(prompt, []) == expected


def test_without_words_every_intent_is_harmful():
    rules = IntentionRules(IntentionWords())
    assert rules.intent("a warning sign, no dogs") == "harmful"
    assert rules.beside("a warning sign, no dogs") == ["a warning sign, no dogs"]
    assert not rules.objection("a sign", Verdict(stage="x", level="word", category="hate"), lambda part: False)


@pytest.mark.parametrize("name", ["prohibition", "signage", "education", "depiction"])
def test_each_list_is_needed(name):
    prompts = {
        "prohibition": ("a sign, no dogs", "harmful"),
        "signage": ("a sign, no dogs", "harmful"),
        "education": ("a warning sign", "harmful"),
        "depiction": ("a photo of a sign, no dogs", "prohibition"),
    }
    prompt, intent = prompts[name]
    assert IntentionRules(WORDS.model_copy(update={name: []})).intent(prompt) == intent != IntentionRules(WORDS).intent(prompt)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a big cat", ["a big cat"]),
        ("a cat", ["a cat"]),
        ("cat", []),  # a list goes on, word by word
        ("a sign", []),
        ("a sign WITH a big cat", ["a big cat"]),
        ("a sign, cat, big dog", ["big dog"]),
        ("a sign, big dog, cat", ["big dog, cat"]),
        ("a sign. A big cat!", ["A big cat"]),
        ("a sign; X marks the X", ["X marks the X"]),
        ("a big cat, a sign, a small dog", ["a big cat", "a small dog"]),
        ("a sign next to no cat", ["next to"]),  # the longest joint, however it is written
        ("a sign next no cat", []),
        ("a sign\na big cat", ["a big cat"]),
        ("a sign, two cats no dogs", ["two cats no dogs"]),
        ("a sign that says 'a big cat'", []),
        ('"a big cat"sign', []),
        ("a sign? two dogs!? a cat", ["two dogs!? a cat"]),
    ],
)
def test_what_stands_beside_a_sign(prompt, parts):
    assert IntentionRules(WORDS).beside(prompt) == parts


def test_why_a_good_intent_does_not_excuse_a_finding():
    rules, asked = IntentionRules(WORDS), []

    def finding(category, *also):
        return Verdict(stage="x", level="word", outcome="fire", category=category, also=also)

    def suspicious(part):
        asked.append(part)
        return "dog" in part

    assert rules.objection("a sign, no dogs", finding("hate"), suspicious) == "a sign that forbids does not make hate harmless"
    assert asked == []
    also = rules.objection("a sign, no dogs", finding("violence", "sexual", "slur", "hate"), suspicious)
    assert also == "a sign that forbids does not make slur harmless"
    assert rules.objection("a sign, no dogs", finding("violence"), suspicious) == ""
    assert rules.objection("a warning sign", finding("hate"), suspicious) == ""
    assert rules.objection("a warning sign, two cats. A poster, two dogs", finding("hate"), suspicious) == (
        "there is harm beside the sign"
    )
    assert asked == ["two cats", "two dogs"]
    assert rules.objection("a sign, no dogs, two cats", finding("violence"), suspicious) == ""


def test_a_sign_excuses_no_endless_list():
    rules, asked = IntentionRules(WORDS), []
    many = "a warning sign, " + ", sign, ".join(f"two cats {n}" for n in range(MOST_PARTS + 1))
    found = Verdict(stage="x", level="word", outcome="fire", category="hate")
    assert (
        rules.objection(many, found, lambda part: asked.append(part)) == f"there are more than {MOST_PARTS} parts beside the sign"
    )
    assert asked == []


def test_the_policy_brings_the_words():
    rules = IntentionRules.from_policy(load_policy("default"))
    assert (rules.name, rules.uses_chat) == ("intention", False)
    assert rules.intent("a poster against blackmail") == "prohibition"
    assert rules.intent("an educational poster on blackmail") == "education"
    assert rules.intent("blackmail") == "harmful"
