"""Helpfulness under a limit on harm without critics: both rewards standardized in their group, joined by the multiplier (ours)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from valign.objectives.rewards import RewardFunction
from valign.objectives.rewards.groups import standardized
from valign.objectives.rewards.safe_rlhf import Multiplier, lagrangian_advantages
from valign.training.tasks.reinforce.group_method import GroupMethod, ScoreColumn


class CostWindow:
    """lambda as it is now, and the latest episodes' costs.

    Args: fixed: Whether lambda stays at its start (an ablation).
    """

    def __init__(self, rule: Multiplier, *, fixed: bool = False) -> None:
        self.rule, self.fixed, self.moved = rule, fixed, rule.start
        self.costs = torch.zeros(0)

    @property
    def value(self) -> float:
        """What the next advantages are joined by."""
        return self.moved if self.fixed else self.rule.applied(self.moved, self.costs)

    def update(self, costs: Float[Tensor, " episode"], step: int) -> dict[str, float]:
        """Take in the costs of step ``step`` (from 0); return numbers for the log."""
        self.costs = torch.cat([self.costs, costs.detach().float().cpu()])[-self.rule.window :]
        moved = self.rule.updated(self.moved, self.costs, step)
        self.moved = self.moved if self.fixed else moved
        return {"multiplier": self.value, "mean_cost": float(self.costs.mean())}

    def extra(self) -> dict[str, Any]:
        return {"multiplier": self.moved, "costs": self.costs}

    def restore(self, extra: Mapping[str, Any]) -> None:
        self.moved, self.costs = float(extra["multiplier"]), extra["costs"]


class LagrangianMethod(GroupMethod):
    """``A = (A_R - lambda A_C) / (1 + lambda)`` with group-standardized parts.

    Args:
        reward: Helpfulness of an answer. cost: Its harm: above 0 is harmful.
        fixed: Whether lambda stays at its start (an ablation).
    """

    name = "grpo-lagrangian"

    def __init__(self, reward: RewardFunction, cost: RewardFunction, rule: Multiplier, *, fixed: bool = False) -> None:
        self.reward, self.cost, self.window = reward, cost, CostWindow(rule, fixed=fixed)

    @property
    def columns(self) -> Mapping[str, tuple[ScoreColumn, float]]:
        return {
            "helpfulness": (lambda rollouts: self.reward([o.prompt for o in rollouts], [o.output for o in rollouts]), 1.0),
            "cost": (lambda rollouts: self.cost([o.prompt for o in rollouts], [o.output for o in rollouts]), 0.0),
        }

    def advantages(
        self, plain: Float[Tensor, " rollout"], scores: Float[Tensor, "rollout column"], places: Sequence[int], group: int
    ) -> Float[Tensor, " rollout"]:
        reward, cost = (standardized(scores[:, column], group) for column in (0, 1))
        return lagrangian_advantages(reward, cost, self.window.value)

    def after_step(self, step: int, scores: Float[Tensor, "rollout column"]) -> dict[str, float]:
        return self.window.update(scores[:, 1], step)

    def recipe(self) -> dict[str, Any]:
        return {**super().recipe(), "multiplier": asdict(self.window.rule), "fixed": self.window.fixed}

    def extra(self) -> dict[str, Any]:
        return self.window.extra()

    def restore(self, extra: Mapping[str, Any]) -> None:
        self.window.restore(extra)
