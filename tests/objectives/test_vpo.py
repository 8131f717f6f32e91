"""Pairs by dominance: the card's invariants, and bad input."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from valign.objectives.preference.vpo import DominancePairs, dominates, read_checks

tables = hnp.arrays(bool, st.tuples(st.integers(2, 5), st.integers(1, 5)))


@given(tables)
def test_dominance_is_irreflexive_antisymmetric_and_transitive(passed):
    wins = dominates(passed)
    assert not np.diag(wins).any()
    assert not (wins & wins.T).any()
    assert not ((wins.astype(int) @ wins.astype(int) > 0) & ~wins).any()
    scores = DominancePairs(weights=(0.7,) * passed.shape[1]).scores(passed)
    assert (scores[:, None] >= scores[None, :])[wins].all()


@given(tables, st.floats(0, 2), st.floats(0, 2))
def test_a_lower_gap_takes_no_pair_away(passed, one, two):
    low, high = sorted((one, two))
    if DominancePairs(gap=high)(passed) is not None:
        assert DominancePairs(gap=low)(passed) is not None
    assert DominancePairs(gap=passed.shape[1] + 1)(passed) is None


def test_the_first_pair_in_order_or_the_one_with_the_largest_gap():
    passed = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
    assert DominancePairs()(passed) == (0, 3)
    assert DominancePairs(pick="largest_gap")(passed) == (2, 3)
    assert DominancePairs(weights=(0.1, 1.0, 0.1))(passed) == (1, 0)
    assert DominancePairs(gap=1.0)(passed) == (1, 3)
    assert DominancePairs()(passed[:1].repeat(3, 0)) is None


def test_bad_input():
    with pytest.raises(ValueError, match="needs 2 candidates of a query, got 1"):
        DominancePairs()(np.ones((1, 2), bool))
    with pytest.raises(ValueError, match="one per check, got 1 for 2"):
        DominancePairs(weights=(1.0,))(np.ones((2, 2), bool))
    with pytest.raises(ValueError, match=r"gap must be in \[0"):
        DominancePairs(gap=-1.0)
    with pytest.raises(ValueError, match=r"weights must be in \[0"):
        DominancePairs(weights=(-1.0,))
    assert read_checks([["Yes", "no"], ["no", " yes "]]).tolist() == [[True, False], [False, True]]
    with pytest.raises(ValueError, match="must be yes or no, got 'maybe'"):
        read_checks([["maybe"]])
    with pytest.raises(ValueError, match="one length"):
        read_checks([["yes"], ["yes", "no"]])
