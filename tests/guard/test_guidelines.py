"""Guidelines: selection, search, what a chat model gets, and what is refused."""

import json
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from valign.checks import UserError
from valign.guard import Guard
from valign.guard.guidelines import SHIPPED, GuidedChat, GuidelineRetriever, are_alike, common_length, diverse, string_ratio
from valign.models.encoders.minilm import MiniLM
from valign.models.heads.bi_encoder import BiEncoder, load_bi_encoder
from valign.models.language.chat import ScriptedChat
from valign.objectives.in_batch_softmax import in_batch_softmax
from valign.policy import Guideline, load_policy

DIM = 8
TEXTS = (
    "Keep weapons at rest: nobody is aimed at.",
    "Keep weapons at rest: nobody is aimed at!",
    "Show food as it is.",
    "Vary people.",
)
LIBRARY = tuple(Guideline(id=f"rule-{number}", text=text, requests=["a"]) for number, text in enumerate(TEXTS))


class Encoder:
    """A fixed vector per text; the request "weapons" is nearest to the first two."""

    name, dim, sha256 = "told", DIM, "0" * 64

    def encode(self, texts):
        rows = np.zeros((len(texts), DIM), np.float32)
        for row, text in zip(rows, texts):
            row[TEXTS.index(text) // 2 if text in TEXTS else 0] = 1
            row[7] = 0.1 * TEXTS.index(text) if text in TEXTS else 0
        return rows


def retriever(**changes):
    same = np.eye(DIM, dtype=np.float32)
    options = {"guidelines": LIBRARY, "model": BiEncoder(same, same, "0" * 64), "load": Encoder} | changes
    return GuidelineRetriever(**options)


@given(st.lists(st.text("abc ", max_size=12), max_size=12), st.integers(1, 6))
def test_selection_is_a_subsequence_of_texts_that_differ(texts, count):
    kept = diverse(texts, count)
    assert kept == sorted(set(kept))
    assert len(kept) <= count
    assert kept[:1] == list(range(len(texts)))[:1]
    assert all(string_ratio(texts[b], texts[a]) < 0.5 for a in kept for b in kept if a < b)
    again = [texts[number] for number in kept]
    assert diverse(again, count) == list(range(len(again)))
    assert diverse(texts, count, alike=1.1) == list(range(len(texts)))[:count]
    assert diverse(texts, 9, alike=0.0) == kept[:1]


def test_the_best_are_given_and_those_alike_left_out():
    assert [one.id for one in retriever().retrieve("weapons")] == ["rule-0", "rule-2", "rule-3"]
    assert [one.id for one in retriever(count=1).retrieve("weapons")] == ["rule-0"]
    assert [one.id for one in retriever(min_score=0.5).retrieve("weapons")] == ["rule-0"]
    assert [one.id for one in retriever(max_chars=45).retrieve("weapons")] == ["rule-0"]
    assert retriever().retrieve("  ") == ()


def test_guidelines_that_do_not_fit_are_logged(caplog):
    assert [one.id for one in retriever(max_chars=59).retrieve("weapons")] == ["rule-0"]  # 41 + 19 + 12 characters
    assert caplog.messages == ["Left out 2 of 3 guidelines beyond 59 characters: rule-2, rule-3"]
    caplog.clear()
    assert len(retriever(max_chars=72).retrieve("weapons")) == 3
    assert not caplog.messages


def test_search_equals_a_full_sort():
    rng = np.random.default_rng(0)
    library = tuple(Guideline(id=f"r-{number}", text=f"{number:05d} {'x' * (number % 7)}") for number in range(300))
    found = retriever(guidelines=library, count=20)
    vars(found)["rows"] = np.round(rng.standard_normal((300, DIM)), 1).astype(np.float32)  # ties
    question = np.round(rng.standard_normal(DIM), 1).astype(np.float32)
    order = np.argsort(-(vars(found)["rows"] @ question), kind="stable")[:20]
    expected = [library[order[place]] for place in diverse([library[number].text for number in order], 20)]
    assert list(found.select(question)) == expected[: len(found.select(question))]
    assert found.select(question)[0] == expected[0]


def test_a_chat_model_gets_guidelines_after_its_own_instruction_and_no_words_of_the_user():
    chat = ScriptedChat(["yes", "yes", "yes"])
    guided = GuidedChat(chat, retriever(count=1))
    asked = [{"role": "system", "content": "Judge."}, {"role": "user", "content": json.dumps({"caption": "weapons"})}]
    assert guided.complete(asked) == "yes"
    assert guided.guided(asked)[0]["content"] == f"Judge.\nGuidelines for this request:\n- {TEXTS[0]}"
    assert guided.guided(asked)[1] == asked[1]
    assert asked[0]["content"] == "Judge."
    assert [one["role"] for one in guided.guided(asked[1:])] == ["system", "user"]
    assert guided.guided([{"role": "user", "content": " "}]) == [{"role": "user", "content": " "}]


def test_the_guards_rewriter_and_value_judge_get_them():
    chat = ScriptedChat(['{"reason": "", "verdict": "SAFE"}'])
    policy = load_policy("default")
    policy = policy.model_copy(update={"guard": policy.guard.model_copy(update={"stages": ["lexical", "values"]})})
    Guard.from_policy(policy, chat=chat).guard("a surgeon at work")
    system = chat.calls[0][0]["content"]
    assert "Keep medicine clinical" in system
    assert 1 <= system.count("\n- ") <= 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidelines": ()}, "must not be empty"),
        ({"guidelines": (LIBRARY[0], LIBRARY[0])}, "the id 'rule-0' twice"),
        ({"guidelines": (Guideline(id="a", text=" "),)}, "no text under 'a'"),
        ({"count": 0}, r"count must be in \[1"),
        ({"max_chars": 20}, "at most 20 characters each, got 41 under 'rule-0': it could never be given"),
    ],
)
def test_a_library_that_is_none_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        retriever(**changes)


def test_a_retriever_of_another_encoder_or_with_nan_is_refused(tmp_path):
    with pytest.raises(UserError, match="fitted on another encoder"):
        retriever(model=load_bi_encoder(SHIPPED)).retrieve("weapons")
    same = np.eye(DIM, dtype=np.float32)
    with pytest.raises(UserError, match="not finite"):
        retriever(model=BiEncoder(same, same * np.nan, "0" * 64)).retrieve("weapons")
    with pytest.raises(UserError, match="a request a vector that is not finite"):
        retriever(model=BiEncoder(same * np.nan, same, "0" * 64)).retrieve("weapons")
    with pytest.raises(ValueError, match=r"diverse\.alike must be in \[0"):
        diverse(TEXTS, 2, alike=float("nan"))
    (tmp_path / "x.safetensors").write_text("x")
    with pytest.raises(UserError, match="is not a retriever of guidelines"):
        load_bi_encoder(tmp_path / "x.safetensors")
    BiEncoder(same, same, "1" * 64).save(tmp_path / "y.safetensors")
    assert load_bi_encoder(tmp_path / "y.safetensors").encoder_sha256 == "1" * 64


def test_loss_in_closed_form():
    rng = torch.Generator().manual_seed(0)
    q, c = torch.randn(4, 3, generator=rng, dtype=torch.float64), torch.randn(8, 3, generator=rng, dtype=torch.float64)
    positive, order = torch.arange(4), torch.randperm(8, generator=rng)
    scores = (q @ c.T).exp()
    expected = -(scores[positive, positive] / scores.sum(1)).log()
    torch.testing.assert_close(in_batch_softmax(q, c, positive), expected)
    torch.testing.assert_close(in_batch_softmax(q, c[order], order.argsort()[:4]), expected)
    torch.testing.assert_close(in_batch_softmax(q * 0, c, positive), torch.full((4,), log(8), dtype=torch.float64))
    with pytest.raises(ValueError, match="must hold 2 or more, got 1"):
        in_batch_softmax(q[:1], c[:1], positive[:1])


def test_the_shipped_retriever_finds_a_held_out_request():
    policy, encoder = load_policy("default"), MiniLM()
    library = tuple(one for one in policy.guidelines if one.requests)
    found = GuidelineRetriever(library, load_bi_encoder(SHIPPED), lambda: encoder)
    assert "drug-neutral" in [one.id for one in found.retrieve("a needle on the floor")]  # kept out of the fit
    assert len(found.retrieve("a needle on the floor")) == 6


@given(st.text("abcd ", max_size=40), st.text("abcd ", max_size=40))
def test_a_bound_on_the_ratio_tells_the_same_as_the_ratio(one, two):
    table = [[0] * (len(two) + 1) for _ in range(len(one) + 1)]
    for i, first in enumerate(one):
        for j, second in enumerate(two):
            table[i + 1][j + 1] = table[i][j] + 1 if first == second else max(table[i][j + 1], table[i + 1][j])
    assert common_length(one, two) == table[-1][-1]
    for least in (0.0, 0.3, 0.5, 0.8, 1.0, 1.1):
        assert are_alike(one, two, least) == (string_ratio(one, two) >= least)
