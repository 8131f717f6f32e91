import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from valign.objectives.rewards.dr_irl import (
    ShadowReward,
    clauses,
    data_hardness,
    distance,
    responsiveness,
    scaled_advantages,
)
from valign.objectives.rewards.groups import standardized


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_equal_distances_and_no_dropped_gap_leave_grpo_as_it_is():
    alpha = data_hardness(torch.full((5,), 0.7))
    assert_close(alpha, torch.ones(5))
    assert responsiveness(torch.tensor([0.1, 0.2, 0.3])) == pytest.approx(1.0)
    advantages = torch.tensor([0.5, -0.5, 1.0, -1.0, 0.0])
    assert torch.equal(scaled_advantages(advantages, torch.ones(5)), advantages)


@given(st.lists(st.integers(0, 200).map(lambda x: x / 100), min_size=2, max_size=20).map(lambda one: [*one[1:], one[0]]))
def test_hardness_has_the_range_and_the_order_of_the_distances(deltas):
    delta = torch.tensor(deltas, dtype=torch.float64)
    alpha = data_hardness(delta)
    assert (alpha > 0.567).all()
    assert (alpha < 1.762).all()
    assert (alpha[delta.argsort()].diff() >= 0).all()
    assert len(alpha.unique()) == len(delta.unique())


def test_hardness_by_hand():
    found = data_hardness(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([0.5 / sigmoid(0.5), sigmoid(1.0) / sigmoid(0.5)])


def test_distance_takes_the_nearest_clause_and_is_not_symmetric():
    x, y = torch.eye(2)
    one, both = x[None], torch.stack([y, x])
    assert distance(one, both) == pytest.approx(0.0)  # every clause of the answer is in the demonstration
    assert distance(both, one) == pytest.approx(0.5)
    assert distance(both, both.flip(0)) == pytest.approx(0.0)  # order does not count
    assert distance(one, -one) == pytest.approx(2.0)
    assert distance(torch.zeros(0, 2), one) == 1.0
    with pytest.raises(ValueError, match="at least one clause"):
        distance(one, torch.zeros(0, 2))
    with pytest.raises(ValueError, match="length above 0, got 1 of 0"):
        distance(torch.zeros(1, 2), one)


def test_clauses_are_sentences_and_parts_of_long_ones():
    assert clauses("No. I will not, sorry!") == ["No.", "I will not, sorry!"]
    long = "first you take the very old kettle from the shelf, and then you fill it"
    assert clauses(long) == ["first you take the very old kettle from the shelf,", "and then you fill it"]
    assert clauses("  ") == []


def test_responsiveness_drops_outliers_and_rises_with_what_is_kept():
    gaps = torch.tensor([1.0, 1.0, 1.0, -3.0], dtype=torch.float64)  # mean 0; only the last is more than 2 away
    assert responsiveness(gaps, tau=4.0) == pytest.approx(sigmoid(1.0) / 0.5)
    assert responsiveness(-gaps, tau=4.0) < 1
    assert responsiveness(torch.tensor([0.0, 1.0]), tau=0.0) == 1.0  # everything is dropped
    with pytest.raises(ValueError, match=r"responsiveness\.tau must be in \[0"):
        responsiveness(gaps, tau=-1.0)
    with pytest.raises(ValueError, match="must be finite"):
        responsiveness(torch.tensor([float("nan"), 1.0]))


def test_scaling_rewards_changes_nothing_and_scaling_advantages_does():
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    plain = standardized(rewards, 4)
    assert_close(standardized(1.5 * rewards, 4), plain, rtol=1e-4, atol=1e-4)  # up to the 1e-4 beside the deviation
    scaled = scaled_advantages(plain, torch.full((4,), 1.5, dtype=torch.float64))
    assert_close(scaled, 1.5 * plain)
    assert float(scaled.sum()) == pytest.approx(0.0, abs=1e-9)
    assert torch.equal(scaled_advantages(torch.zeros(4), torch.full((4,), 1.7)), torch.zeros(4))


def test_the_shadow_reward_prefers_demonstrations():
    high, low = torch.tensor([1.0]), torch.tensor([-1.0])
    for form in ("logistic", "linear"):
        loss = ShadowReward(form=form)
        assert loss(high, low) < loss(low, high)
    assert_close(ShadowReward(l2=0.0)(low, low), torch.tensor([math.log(2)]))
    assert_close(ShadowReward(form="linear", beta=0.5, l2=0.1)(high, low), torch.tensor([-4 + 0.2]))
    with pytest.raises(ValueError, match="Without it the reward grows for ever"):
        ShadowReward(form="linear", l2=0.0)


def test_bad_groups_and_coefficients_are_refused():
    with pytest.raises(ValueError, match="at least 2 answers, got 1"):
        standardized(torch.zeros(3), 1)
    with pytest.raises(ValueError, match="whole groups of 2, got 3"):
        standardized(torch.zeros(3), 2)
    with pytest.raises(ValueError, match="must be finite, got 1"):
        standardized(torch.tensor([float("nan"), 0.0]), 2)
    with pytest.raises(ValueError, match="at least 2 prompts"):
        data_hardness(torch.zeros(1))
    for alpha in (torch.zeros(2), torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match="coefficients must be above 0, one per rollout"):
            scaled_advantages(torch.ones(2), alpha)
