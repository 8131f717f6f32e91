"""Rewards of reinforcement: pure functions, by name, and the maths of each method that reinforces."""

from collections.abc import Mapping

from valign.objectives.rewards.verifiable import (
    RewardFunction,
    demonstration_reward,
    format_reward,
    refusal_reward,
    safety_reward,
)
from valign.plugins import with_plugins

# What `valign train rl --reward` names; packages add rows under "valign.rewards".
REWARDS: Mapping[str, RewardFunction] = with_plugins(
    "valign.rewards",
    {
        "safety": safety_reward,
        "format": format_reward,
        "refusal": refusal_reward,
        "demonstration": demonstration_reward,
    },
)

__all__ = ["REWARDS", "RewardFunction"]
