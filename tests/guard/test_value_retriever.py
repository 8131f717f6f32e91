import json

import numpy as np
import pytest

from valign.checks import UserError
from valign.guard.value_retriever import Always, ChatRetriever, EmbeddingRetriever, FirstOf, KeywordRetriever
from valign.interfaces import Retriever
from valign.models.language.chat import ScriptedChat
from valign.policy import load_policy


@pytest.fixture(scope="module")
def policy():
    return load_policy("default")


@pytest.fixture(scope="module")
def bare(policy):
    return policy.model_copy(update={"principles": []})


@pytest.mark.parametrize(
    ("prompt", "principle"),
    [
        ("A NURSE at work", "gender-equality"),
        ("a topless man", "nudity-inappropriate"),
        ("blood-red curtains", "blood-inappropriate"),
        ("ｚｏｍｂｉｅ in a street", "horror-inappropriate"),  # full-width letters
        ("a nude and a zombie", "nudity-inappropriate"),  # the policy's order decides
        ("a nursery with toys", None),
        ("a bloodhound", None),
        ("", None),
    ],
)
def test_keywords_are_whole_words_in_the_policys_order(policy, prompt, principle):
    assert KeywordRetriever(policy).retrieve(prompt) == principle


def test_a_category_lends_its_words_but_not_the_held_out_ones():
    retriever = KeywordRetriever(load_policy("shapes"))
    assert retriever.retrieve("what turned the straw to ash, on a beach") == "no-rays"
    assert retriever.retrieve("a captain in a meadow") == "equal-heads"
    assert retriever.retrieve("a comet at dusk") is None
    assert retriever.retrieve("a fl4me at dusk") == "no-rays"
    assert retriever.retrieve("a c-a-p-t-a-i-n") == "equal-heads"


def bag(texts):
    """A toy embedder: counts of five words."""
    words = ("nurse", "doctor", "blood", "naked", "zombie")
    return np.array([[text.lower().count(word) for word in words] for text in texts], dtype=float)


def test_meaning_needs_the_threshold(policy):
    retriever = EmbeddingRetriever(policy, bag, threshold=0.9)
    assert retriever.retrieve("a doctor") == "gender-equality"
    assert retriever.retrieve("zombie zombie") == "horror-inappropriate"
    assert retriever.retrieve("blood on a zombie") is None  # cosine 0.71 to either
    assert EmbeddingRetriever(policy, bag, threshold=0.7).retrieve("blood on a zombie") is not None
    assert retriever.retrieve("a tree") is None  # no direction at all
    assert retriever.retrieve("  ") is None


def test_a_window_finds_what_much_else_hides(policy):
    hidden = "a doctor who met a naked zombie, blood everywhere"  # all four directions at once: no cosine above 0.5
    assert EmbeddingRetriever(policy, bag, threshold=0.9).retrieve(hidden) is None
    found = EmbeddingRetriever(policy, bag, threshold=0.9, window=3)
    assert found.retrieve(hidden) == "gender-equality"  # as near as the others, and first
    assert found.retrieve("a doctor") == "gender-equality"  # shorter than the window
    assert found.retrieve("  ") is None
    assert found.fingerprint() != EmbeddingRetriever(policy, bag, threshold=0.9).fingerprint()


def test_an_embedding_retriever_may_look_at_some_principles_alone(policy):
    harms = tuple(principle.id for principle in policy.principles if principle.kind == "toxicity")
    found = EmbeddingRetriever(policy, bag, threshold=0.9, among=harms)
    assert found.retrieve("a doctor") is None
    assert found.retrieve("zombie zombie") == "horror-inappropriate"
    with pytest.raises(ValueError, match="nonsense"):
        EmbeddingRetriever(policy, bag, threshold=0.9, among=("nonsense",))


def test_one_principle_for_all():
    assert Always("calm").retrieve("whatever") == "calm"
    assert Always("calm").fingerprint() != Always("bright").fingerprint()


def test_a_chat_model_answers_by_the_schema(policy):
    answers = ['{"principle": "gender-equality"}', '```json\n{"principle": "not-applicable"}\n```']
    retriever = ChatRetriever(policy, ScriptedChat(answers))
    assert retriever.retrieve("people in a queue") == "gender-equality"
    assert retriever.retrieve("a tree") is None
    assert retriever.unreadable == []
    asked = retriever.chat.calls[0]
    assert all(principle.id in asked[0]["content"] for principle in policy.principles)
    assert json.loads(asked[1]["content"]) == "people in a queue"


@pytest.mark.parametrize("answer", ["no idea", '{"principle": "kindness"}', '{"principle": 3}', "{broken", '["a"]'])
def test_what_a_chat_model_says_beside_the_schema_is_no_token(policy, answer):
    retriever = ChatRetriever(policy, ScriptedChat([answer]))
    assert retriever.retrieve("people") is None
    assert retriever.unreadable == [answer]


def test_a_chat_model_may_be_limited_to_some(policy):
    retriever = ChatRetriever(
        policy, ScriptedChat(['{"principle": "blood-inappropriate"}']), among=("gender-equality", "racial-equality")
    )
    assert retriever.retrieve("people") is None
    with pytest.raises(UserError, match="principle must be one of"):
        ChatRetriever(policy, ScriptedChat([]), among=("kindness",))


def test_keywords_come_before_the_chat_model(policy):
    chat = ScriptedChat(['{"principle": "racial-equality"}'])
    both = FirstOf((KeywordRetriever(policy), ChatRetriever(policy, chat)))
    assert isinstance(both, Retriever)
    assert both.retrieve("a nurse") == "gender-equality"
    assert chat.calls == []
    assert both.retrieve("people in a queue") == "racial-equality"


def test_fingerprints_change_with_what_shapes_an_answer(policy):
    other = load_policy("shapes")
    made = [
        KeywordRetriever(policy),
        KeywordRetriever(other),
        EmbeddingRetriever(policy, bag, 0.5),
        EmbeddingRetriever(policy, bag, 0.6),
        EmbeddingRetriever(policy, lambda texts: bag(texts) + 1, 0.5),
        ChatRetriever(policy, ScriptedChat([])),
        ChatRetriever(policy, ScriptedChat([]), among=("gender-equality",)),
    ]
    made.append(FirstOf(tuple(made[:2])))
    assert len({retriever.fingerprint() for retriever in made}) == len(made)
    assert KeywordRetriever(load_policy("default")).fingerprint() == made[0].fingerprint()


def test_a_policy_without_principles_is_refused(bare):
    for make in (
        KeywordRetriever,
        lambda rules: EmbeddingRetriever(rules, bag, 0.5),
        lambda rules: ChatRetriever(rules, ScriptedChat([])),
    ):
        with pytest.raises(UserError, match="has no principle"):
            make(bare)


@pytest.mark.parametrize("bad", [-1.1, 2.0, float("nan")])
def test_refuses_a_threshold_that_is_no_cosine(policy, bad):
    with pytest.raises(ValueError, match=r"EmbeddingRetriever\.threshold must be in \[-1, 1\]"):
        EmbeddingRetriever(policy, bag, bad)
    with pytest.raises(ValueError, match=r"EmbeddingRetriever\.window must be in \[1, inf\)"):
        EmbeddingRetriever(policy, bag, 0.5, window=0)
