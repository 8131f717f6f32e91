"""Drift and skill on vectors that are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from valign.data.tasks.texts import TextRow
from valign.evaluation.adapters.retention import Probe, cosines, skill

vectors = hnp.arrays(np.float64, (4, 3), elements=st.floats(-5, 5, allow_subnormal=False))


def encoder(table):
    """Says the vectors it was given, by text."""
    return lambda texts: np.array([table[text] for text in texts])


@given(vectors, vectors, st.floats(0.1, 10))
def test_cosines_are_bounded_and_forget_length(left, right, factor):
    found = cosines(left, right)
    assert (np.abs(found) <= 1 + 1e-9).all()
    assert np.allclose(found, cosines(factor * left, right), atol=1e-9)


def test_cosines_of_tiny_vectors_do_not_underflow():
    tiny = np.array([[6.8e-160, 6.8e-160, 0.0]])
    assert cosines(tiny, np.array([[1.0, 0.0, 0.0]])) == pytest.approx(0.5**0.5)


def test_a_model_that_did_not_move_has_no_drift_and_its_skill():
    table = {"a": [1.0, 0.0], "b": [1.0, 0.1], "c": [0.0, 1.0], "d": [1.0, 1.0]}
    rows = [TextRow(("a", "b"), 5.0), TextRow(("a", "c"), 0.0), TextRow(("a", "d"), 3.0)]
    probe = Probe.of(encoder(table), rows)
    same = probe.measure(encoder(table))
    assert same.drift == pytest.approx(0, abs=1e-12)
    assert same.skill == same.skill_before == pytest.approx(1.0)
    turned = probe.measure(encoder({text: [-x for x in vector] for text, vector in table.items()}))
    assert turned.drift == pytest.approx(2.0)
    assert turned.skill == pytest.approx(1.0)  # pairs are as far apart as before


def test_classes_are_ranked_in_the_order_given():
    table = {"a": [1.0, 0.0], "b": [1.0, 0.1], "c": [0.0, 1.0]}
    rows = [TextRow(("a", "b"), "same"), TextRow(("a", "c"), "other")]
    assert Probe.of(encoder(table), rows, ("other", "same")).measure(encoder(table)).skill == pytest.approx(1.0)


def test_what_is_constant_correlates_with_nothing():
    assert skill(np.ones((6, 2)), np.arange(3.0)) == 0
    assert skill(np.random.default_rng(0).normal(size=(6, 2)), np.ones(3)) == 0
