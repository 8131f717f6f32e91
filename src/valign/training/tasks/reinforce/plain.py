"""Plain GRPO on one reward, for comparison and for rewards of one's own."""

from collections.abc import Mapping

from valign.objectives.rewards import RewardFunction
from valign.training.tasks.reinforce.group_method import GroupMethod, ScoreColumn


class PlainMethod(GroupMethod):
    """The standardized reward and nothing else."""

    name = "grpo"

    def __init__(self, reward: RewardFunction) -> None:
        self.reward = reward

    @property
    def columns(self) -> Mapping[str, tuple[ScoreColumn, float]]:
        return {"score": (lambda rollouts: self.reward([o.prompt for o in rollouts], [o.output for o in rollouts]), 1.0)}
