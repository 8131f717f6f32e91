"""The proximal step against its own optimality, the reference code's against a loop, the schedules."""

from math import exp, log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from valign.adapters.gate import reference_threshold, soft_threshold, threshold_schedule

values = st.lists(st.floats(-3, 3), min_size=1, max_size=6).map(lambda v: torch.tensor(v, dtype=torch.float64))


@given(values, st.floats(0, 2), st.floats(-4, 4))
def test_soft_is_the_exact_minimizer(gate, threshold, other):
    found = soft_threshold(gate, threshold)

    def cost(u):
        return 0.5 * (u - gate).square() + threshold * u.abs()

    assert (cost(found) <= cost(torch.full_like(gate, other)) + 1e-12).all()
    assert_close(found.abs(), (gate.abs() - threshold).clamp(min=0))
    assert (found * gate >= 0).all()


@given(values, st.floats(0, 1), st.floats(0, 1))
def test_soft_thresholds_add_up_and_zero_is_nothing(gate, one, two):
    assert_close(soft_threshold(soft_threshold(gate, one), two), soft_threshold(gate, one + two))
    assert torch.equal(soft_threshold(gate, 0.0), gate)
    assert torch.equal(reference_threshold(gate, 0.0), gate)


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=8), st.integers(0, 6))
def test_the_reference_is_three_updates_in_turn(gate, threshold):
    expected = list(gate)  # in integers, so that "exactly equal to the threshold" happens
    expected = [g - threshold if g > threshold else g for g in expected]
    expected = [g + threshold if g < -threshold else g for g in expected]
    expected = [0 if abs(g) < threshold else g for g in expected]
    assert reference_threshold(torch.tensor(gate, dtype=torch.float64), float(threshold)).tolist() == expected


def test_the_reference_zeroes_up_to_twice_the_threshold():
    found = reference_threshold(torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, -1.9, -2.5], dtype=torch.float64), 1.0)
    assert found.tolist() == [0.0, 1.0, 0.0, 1.0, 2.0, 0.0, -1.5]


def test_schedules():
    assert threshold_schedule(0.0, 1.0, 3) == [0.0, 0.5, 1.0]
    assert threshold_schedule(1.0, 4.0, 3, "exp_linear") == pytest.approx([1.0, 2.0, 4.0])
    assert threshold_schedule(0.0, 1.0, 3, "log_linear") == pytest.approx([0.0, log((1 + exp(1)) / 2), 1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1.0, 1), r"threshold_schedule\.length must be in \[2, inf\), got 1"),
        ((1.0, 0.5, 3), r"threshold_schedule\.last must be in \[1, inf\), got 0\.5"),
        ((-1.0, 0.5, 3), r"threshold_schedule\.first must be in \[0, inf\), got -1"),
        ((0.0, 0.5, 3, "exp_linear"), r"threshold_schedule\.first must be in \(0, inf\), got 0\.0\. A geometric"),
    ],
)
def test_refuses_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        threshold_schedule(*arguments)


@pytest.mark.parametrize("step", [soft_threshold, reference_threshold])
def test_refuses_a_negative_threshold(step):
    with pytest.raises(ValueError, match=r"threshold must be in \[0, inf\), got -1"):
        step(torch.ones(2), -1.0)
