import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import entropy

from valign.checks import UserError
from valign.evaluation.images.inception_score import inception_score

rows = st.tuples(st.integers(1, 12), st.integers(2, 6)).flatmap(
    lambda shape: hnp.arrays("float64", shape, elements=st.floats(0.01, 1)).map(lambda a: a / a.sum(1, keepdims=True))
)


def test_sure_and_diverse_is_the_number_of_classes():
    assert inception_score(np.eye(4)) == (pytest.approx(4.0), 0.0)


def test_alike_or_unsure_is_one():
    assert inception_score(np.tile([1.0, 0.0, 0.0], (6, 1)))[0] == pytest.approx(1)
    assert inception_score(np.full((6, 3), 1 / 3))[0] == pytest.approx(1)


@given(rows)
def test_agrees_with_scipys_divergence(values):
    mean = values.mean(0)
    expected = np.exp(np.mean([entropy(row, mean) for row in values]))
    assert inception_score(values)[0] == pytest.approx(expected)
    assert 1 - 1e-9 <= expected <= values.shape[1] + 1e-9


def test_parts_are_cut_in_order():
    values = np.vstack([np.eye(2), np.tile([1.0, 0.0], (2, 1))])  # first half 2, second half 1
    assert inception_score(values, splits=2) == (pytest.approx(1.5), pytest.approx(0.5))


@pytest.mark.parametrize("splits", [0, 4])
def test_refuses_more_parts_than_images(splits):
    with pytest.raises(UserError, match=r"splits must be in \[1, 3\]"):
        inception_score(np.full((3, 2), 0.5), splits=splits)


@pytest.mark.parametrize("bad", [[[0.5, 0.6]], [[1.5, -0.5]], [[float("nan"), 1.0]]])
def test_refuses_logits(bad):
    with pytest.raises(UserError, match="Apply a softmax"):
        inception_score(np.array(bad))
