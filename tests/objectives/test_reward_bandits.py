"""The methods on bandits: the smallest policies on which what each promises can be seen."""

from math import log

import torch
from torch.nn.functional import logsigmoid

from valign.objectives.rewards.alphaalign import VerifiableSafety, normalized_helpfulness
from valign.objectives.rewards.dr_irl import scaled_advantages
from valign.objectives.rewards.groups import standardized
from valign.objectives.rewards.safe_rlhf import (
    Multiplier,
    actor_loss,
    estimated_advantages,
    lagrangian_advantages,
    token_signals,
)

REWARD, COST = torch.tensor([1.0, 0.6, 0.0]), torch.tensor([1.0, -1.0, -1.0])


def lagrangian_bandit(rule, *, fixed=False, steps, weight=0.1):
    """Costs of PPO's policy with one token an answer on its way, and the multiplier's; the reference is uniform."""
    draws = torch.Generator().manual_seed(0)
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    value, costs, path, window = rule.start, [], [], torch.zeros(0)
    mask = torch.ones(64, 1, dtype=torch.bool)
    for step in range(steps):
        shares = logits.detach().softmax(0)
        arms = torch.multinomial(shares, 64, replacement=True, generator=draws)
        log_probs = logits.log_softmax(0)[arms][:, None]
        signals = token_signals(log_probs.detach() + log(3), REWARD[arms], COST[arms], mask, weight=weight)
        reward, cost = (estimated_advantages(one, one.mean().expand(64, 1), mask)[0] for one in signals)
        loss = actor_loss(log_probs, log_probs.detach(), lagrangian_advantages(reward, cost, rule.applied(value, window)), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        window = torch.cat([window, COST[arms]])[-rule.window :]
        value = value if fixed else rule.updated(value, window, step)
        costs.append(float(shares @ COST))
        path.append(value)
    return costs, path


def test_the_multiplier_brings_the_cost_to_its_limit_and_keeps_it_there():
    rule = Multiplier(start=1.0, limit=-0.5)
    costs, path = lagrangian_bandit(rule, steps=300)
    assert max(abs(cost - rule.limit) for cost in costs[220:]) < 0.1
    assert all(0 < value <= rule.highest for value in path)
    broken, _ = lagrangian_bandit(Multiplier(start=0.1, limit=-0.5), fixed=True, steps=100)
    assert min(broken[60:]) > 0.5  # far above the limit


def test_damping_holds_the_cost_at_its_limit_where_the_rule_alone_goes_round_it():  # with the reference's small token weight
    swings = {}
    for damping in (0.0, 2.0):
        costs, _ = lagrangian_bandit(Multiplier(start=1.0, limit=-0.5, damping=damping), steps=300, weight=0.02)
        swings[damping] = max(abs(cost + 0.5) for cost in costs[150:])
    assert swings[2.0] < 0.15 < 0.4 < swings[0.0]


def alphaalign_bandit(*, helpful, steps=200):
    """Shares of (refuse, help well, help badly, no format) for a harmful and a benign prompt; raw scores of either kind of help."""
    draws = torch.Generator().manual_seed(1)
    logits = torch.zeros(2, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    raw_scores, rule = torch.tensor([0.0, 100.0, 20.0, 0.0]), VerifiableSafety()
    for _ in range(steps):
        arms = torch.multinomial(logits.detach().softmax(1), 8, replacement=True, generator=draws)
        harmful = torch.tensor([True, False]).repeat_interleave(8)
        flat = arms.reshape(-1)
        rewards = rule(flat != 3, flat == 0, harmful)
        if helpful:
            rewards[8:] += normalized_helpfulness(raw_scores[arms[1:]], arms[1:] == 0)[0]
        advantages = standardized(rewards, 8).reshape(2, 8)
        loss = -(logits.log_softmax(1).gather(1, arms) * advantages).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().softmax(1)


def test_alphaalign_refuses_what_is_harmful_and_learns_to_help_well():
    harmful, benign = alphaalign_bandit(helpful=True)
    assert harmful[0] > 0.95
    assert benign[1] > 0.9
    assert benign[0] < 0.02
    _, alone = alphaalign_bandit(helpful=False)
    assert alone[0] < 0.02
    assert alone[1] < 0.9  # nothing tells good help from bad


def scaled_bandit(alpha, *, steps=60):
    """Success of three prompts that differ in how likely it is at first."""
    draws = torch.Generator().manual_seed(2)
    logits = torch.tensor([0.0, -1.0, -3.0], requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.3)
    for _ in range(steps):
        won = (torch.rand(3, 8, generator=draws) < logits.detach().sigmoid()[:, None]).float()
        advantages = scaled_advantages(standardized(won.reshape(-1), 8), torch.tensor(alpha).repeat_interleave(8)).reshape(3, 8)
        log_probs = torch.where(won > 0, logsigmoid(logits)[:, None], logsigmoid(-logits)[:, None])
        loss = -(log_probs * advantages).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().sigmoid()


def test_difficulty_scaling_helps_the_hardest_prompt_most():
    plain, scaled = scaled_bandit([1.0, 1.0, 1.0]), scaled_bandit([0.8, 1.0, 1.5])
    assert scaled[2] > plain[2]
    assert float(scaled.mean()) > float(plain.mean()) - 0.02
