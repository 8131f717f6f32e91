import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from valign.objectives.rewards.safe_rlhf import (
    Multiplier,
    actor_loss,
    cost_loss,
    critic_loss,
    estimated_advantages,
    lagrangian_advantages,
    reward_loss,
    token_signals,
)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_multiplier_rises_above_the_limit_and_falls_below_it():
    rule = Multiplier(start=1.0, limit=0.0, rate=0.1, delay=1)
    assert rule.updated(1.0, torch.tensor([0.5]), 1) == pytest.approx(math.exp(0.05))
    assert rule.updated(1.0, torch.tensor([-0.5]), 1) == pytest.approx(math.exp(-0.05))
    assert rule.updated(1.0, torch.tensor([0.0]), 1) == pytest.approx(1.0)
    assert rule.updated(1.0, torch.tensor([0.5]), 0) == 1.0  # before the delay
    assert Multiplier(start=1.0, limit=0.0, window=2).updated(1.0, torch.tensor([99.0, 0.5, -0.5]), 5) == pytest.approx(1.0)


@given(st.floats(0.01, 20), st.floats(-50, 50))
def test_the_multiplier_stays_within_its_bounds(value, cost):
    found = Multiplier().updated(value, torch.tensor([cost]), 3)
    assert 0 < found <= 20


def test_damping_turns_back_before_the_limit_is_reached():  # log lambda + 2 (cost - limit)
    rule, above = Multiplier(start=1.0, highest=3.0, limit=-0.5, window=2, damping=2.0), torch.tensor([9.0, -0.5, -0.3])
    assert rule.applied(1.0, above) == pytest.approx(math.exp(2 * 0.1))
    assert rule.applied(1.0, torch.tensor([-1.0])) == pytest.approx(math.exp(-1))
    assert rule.applied(0.7, torch.tensor([-0.5])) == pytest.approx(0.7)  # nothing at the limit
    assert rule.applied(1.0, torch.tensor([1e9])) == pytest.approx(3.0)
    assert rule.applied(1.0, torch.zeros(0)) == 1.0
    assert Multiplier(start=1.0).applied(1.0, above) == 1.0  # the paper's rule


def test_bad_multipliers_are_refused():
    with pytest.raises(ValueError, match=r"Multiplier\.start must be in \(0, 20\], got 30"):
        Multiplier(start=30.0)
    with pytest.raises(ValueError, match=r"Multiplier\.rate must be in \[0"):
        Multiplier(rate=-0.1)
    with pytest.raises(ValueError, match=r"Multiplier\.damping must be in \[0"):
        Multiplier(damping=-1.0)
    with pytest.raises(ValueError, match="at least one answer, got none"):
        Multiplier().updated(1.0, torch.zeros(0), 1)
    with pytest.raises(ValueError, match="Costs must be finite"):
        Multiplier().updated(1.0, torch.tensor([float("nan")]), 1)


def test_the_joint_advantage_goes_from_reward_to_minus_cost():
    reward, cost = rows([1.0, -2.0]), rows([3.0, 0.5])
    assert_close(lagrangian_advantages(reward, cost, 0.0), reward)
    assert_close(lagrangian_advantages(reward, cost, 1e9), -cost, rtol=1e-6, atol=1e-6)


@given(st.floats(0, 20))
def test_the_kl_has_the_same_weight_at_every_multiplier(multiplier):
    mask = torch.tensor([[True, True, False]])
    kl, nothing = rows([0.3, -0.2, 9.0]), torch.zeros(1, dtype=torch.float64)
    signals = token_signals(kl, nothing, nothing, mask)
    reward, cost = (estimated_advantages(one, torch.zeros_like(kl), mask)[0] for one in signals)
    assert_close(lagrangian_advantages(reward, cost, multiplier), reward)


def test_signals_end_at_the_last_token_and_are_clamped():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    reward, cost = token_signals(torch.zeros(2, 3), torch.tensor([1.0, 99.0]), torch.tensor([-2.0, 0.0]), mask)
    assert reward.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 50.0]]
    assert cost.tolist() == [[0.0, -2.0, 0.0], [0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="at least one token, got 1 without"):
        token_signals(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1), torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be finite"):
        token_signals(torch.zeros(1, 1), torch.tensor([float("nan")]), torch.zeros(1), torch.ones(1, 1, dtype=torch.bool))


def test_without_discount_and_values_an_advantage_is_the_sum_of_what_follows():
    mask = torch.ones(1, 4, dtype=torch.bool)
    found, returns = estimated_advantages(rows([1.0, 2.0, 3.0, 4.0]), torch.zeros(1, 4, dtype=torch.float64), mask, gae=1.0)
    assert found.tolist() == [[10.0, 9.0, 7.0, 4.0]]
    assert_close(returns, found)


def test_padding_changes_nothing():
    signals, values, mask = rows([1.0, 2.0]), rows([0.5, -0.5]), torch.ones(1, 2, dtype=torch.bool)
    plain, _ = estimated_advantages(signals, values, mask)
    more = [torch.cat([one, rows([7.0, 8.0])], dim=1) for one in (signals, values)]
    wide = torch.tensor([[True, True, False, False]])
    padded, _ = estimated_advantages(*more, wide)
    assert_close(padded[:, :2], plain)
    assert padded[:, 2:].tolist() == [[0.0, 0.0]]
    log_probs = rows([-1.0, -2.0, -3.0, -4.0]).requires_grad_()
    loss = actor_loss(log_probs, log_probs.detach() - 0.1, padded, wide)
    loss.backward()
    assert_close(loss, actor_loss(log_probs[:, :2], log_probs[:, :2].detach() - 0.1, plain, mask))
    assert log_probs.grad[:, 2:].tolist() == [[0.0, 0.0]]


def test_a_policy_that_has_not_moved_loses_its_mean_advantage():
    log_probs, advantages = rows([-1.0, -2.0, -9.0]), rows([0.4, 0.8, 5.0])
    mask = torch.tensor([[True, True, False]])
    assert_close(actor_loss(log_probs, log_probs, advantages, mask), torch.tensor(-0.6, dtype=torch.float64))


def test_the_critic_loss_is_half_the_squared_error_unless_it_clips():
    values, old, returns = rows([1.0, 2.0]), rows([0.5, 2.5]), rows([3.0, 0.0])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert_close(critic_loss(values, old, returns, mask), torch.tensor(0.5 * (4 + 4) / 2, dtype=torch.float64))
    clipped = critic_loss(rows([10.0]), rows([0.0]), rows([10.0]), mask[:, :1])  # the clipped value 5 is 5 away
    assert_close(clipped, torch.tensor(12.5, dtype=torch.float64))


def test_reward_and_cost_losses_rank_and_bound():
    two, one = rows(2.0), rows(1.0)
    assert reward_loss(two, one) < reward_loss(one, two)
    assert_close(reward_loss(two, one, l2=0.1), rows(math.log1p(math.exp(-1.0)) + 0.1 * 5 / 2))
    high, low = rows(1.0), rows(-1.0)
    assert cost_loss(high, low, high, low) < cost_loss(low, high, high, low)
    softplus = [math.log1p(math.exp(x)) for x in (-2.0, -1.0, -1.0)]  # ranked; harmful above 0; harmless below 0
    assert_close(cost_loss(high, low, high, low, l2=0.0), rows(sum(softplus)))


def test_a_severity_of_zero_adds_log_two_and_no_gradient():
    high = rows(1.0).requires_grad_()
    plain = cost_loss(high, rows(-1.0), rows(0.0), rows(0.0), l2=0.0)
    assert_close(plain, rows(math.log1p(math.exp(-2.0)) + 2 * math.log(2)))
    (gradient,) = torch.autograd.grad(plain.sum(), high)
    assert_close(gradient, rows(-1 / (1 + math.exp(2.0))))  # of the ranking alone
