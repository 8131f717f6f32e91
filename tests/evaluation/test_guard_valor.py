"""VALOR's metrics on prompts that can be counted by hand, and against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from valign.data.prompts.pairs import LabelledPrompt
from valign.evaluation.guards.page import page
from valign.evaluation.guards.rates import Rewrite, Scored, summary
from valign.evaluation.guards.valor import Confusion, decision_rates, intention_rates, rewrite_rates, valor_metrics


def scored(number, label, flagged, intent="unknown", rewrite=None, source="one"):
    row = LabelledPrompt(f"{source}:{number}", f"prompt {number}", label, (), source, str(number))
    return Scored(row, flagged, float(flagged), "lexical" if flagged else "", "", (), intent, rewrite)


FIVE = [
    scored(0, 1, True, "harmful", Rewrite(made=True, terms=2, terms_left=1, keep_words=0.5, keep_meaning=0.8)),
    scored(1, 1, True, "harmful", Rewrite(made=True, keep_words=0.3)),
    scored(2, 1, False, "education"),
    scored(3, 0, True, "harmful", Rewrite(made=False)),
    scored(4, 0, False, source="two"),
]


def test_decisions_by_hand():
    rates = decision_rates(FIVE)
    assert rates["all"] == {
        "cases": 5, "accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "fpr": 1 / 2, "fnr": 1 / 3,
    }  # fmt: skip
    assert rates["two"] == {
        "cases": 1, "accuracy": 1.0, "precision": None, "recall": None, "f1": None, "fpr": 0.0, "fnr": None,
    }  # fmt: skip


def test_intentions_where_the_judge_was_asked():  # harmful, harmful, not, harmful against 1, 1, 1, 0
    rates = intention_rates(FIVE)
    assert (rates["cases"], rates["accuracy"], rates["precision"], rates["f1"]) == (4, 2 / 4, 2 / 3, 2 / 3)
    assert intention_rates(FIVE[4:])["accuracy"] is None


def test_rewrites_by_hand():
    rates = rewrite_rates(FIVE)
    assert (rates["prompts"], rates["with_listed_terms"], rates["unsafe_removal"]) == (3, 1, 0.5)
    assert rates["rewritten"]["value"] == pytest.approx(2 / 3)
    assert (rates["keep_words"], rates["keep_meaning"]) == (pytest.approx(0.4), pytest.approx(0.8))
    assert rewrite_rates(FIVE[4:]) == {
        "prompts": 0, "rewritten": None, "with_listed_terms": 0, "unsafe_removal": None, "keep_words": None, "keep_meaning": None,
    }  # fmt: skip


def test_no_precision_where_nothing_is_unsafe():
    assert Confusion.of(np.array([True, False]), np.array([False, False])).rates()["precision"] is None


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_rates_are_scikit_learns(pairs):
    found, truth = np.array(pairs, bool).T
    rates = Confusion.of(found, truth).rates()
    assert rates["accuracy"] == pytest.approx(accuracy_score(truth, found))
    if found.any() and truth.any():
        assert rates["precision"] == pytest.approx(precision_score(truth, found))
    if truth.any():
        assert rates["recall"] == pytest.approx(recall_score(truth, found))
        assert rates["f1"] == pytest.approx(f1_score(truth, found))


def test_the_page_shows_them_and_nothing_where_there_is_nothing():
    shown = page({**summary(FIVE, show_prompts=False), "valor": valor_metrics(FIVE)})
    assert "| all | 5 | 60.0% | 66.7% | 66.7% | 66.7% | 50.0% | 33.3% |" in shown
    assert "| two | 1 | 100.0% | - | - | - | 0.0% | - |" in shown
    assert "| intent | 4 | 50.0% | 66.7% | 66.7% | 66.7% | 100.0% | 33.3% |" in shown
    assert "| 1 | 0.500 | 0.400 | 0.800 |" in shown
    assert "asked to rewrite" not in page({**summary(FIVE[4:], show_prompts=False), "valor": valor_metrics(FIVE[4:])})
