"""Scores against scikit-learn and SciPy, on anything that can be said."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef

from valign.training.tasks.supervised.scores import accuracy, f1, matthews, pearson, spearman

classes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40).map(lambda rows: np.array(rows).T)


@given(classes)
def test_matthews_and_f1_are_those_of_scikit_learn(sides):
    truth, answer = sides
    assert np.isclose(matthews(truth, answer), matthews_corrcoef(truth, answer), atol=1e-9)
    assert np.isclose(f1(truth, answer), f1_score(truth, answer, average="macro"), atol=1e-9)
    assert 0 <= accuracy(truth, answer) <= 1


def test_what_is_always_the_same_correlates_with_nothing():
    flat, steps = np.ones(5), np.arange(5.0)
    assert spearman(flat, steps) == pearson(steps, flat) == 0
    assert np.isclose(spearman(steps, steps**3), 1)
    assert np.isclose(pearson(steps, -steps), -1)
