"""What a method that compares groups of answers says of each: its scores, what becomes of them, and its state."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError
from valign.data.chats.reward_prompts import RewardPrompt

# greedy answers of the policy as it is now, one per prompt
Answerer = Callable[[Sequence[RewardPrompt]], list[str]]


@dataclass(frozen=True)
class Rollout:
    """One sampled answer."""

    prompt: RewardPrompt
    place: int  # of the prompt in the data
    output: str  # all that the policy said, tags of a template included


ScoreColumn = Callable[[Sequence[Rollout]], Float[Tensor, " rollout"]]


class GroupMethod(ABC):
    """One row of scores per answer becomes a reward (the weighted sum of a row) and, relative to its group, an advantage."""

    name: str
    needs: tuple[str, ...] = ()  # labels that every prompt must have
    template: str | None = None  # put around each query; None leaves it as it is

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, tuple[ScoreColumn, float]]:
        """Scores by name, each with its weight in the reward; a score with weight 0 only serves the others."""

    def combined(self, scores: Float[Tensor, "rollout column"], group: int) -> Float[Tensor, "rollout column"]:
        """Scores that look at a whole group, in place of the raw ones. ``group`` consecutive rows are one prompt's."""
        return scores

    def advantages(
        self, plain: Float[Tensor, " rollout"], scores: Float[Tensor, "rollout column"], places: Sequence[int], group: int
    ) -> Float[Tensor, " rollout"]:
        """What each answer's tokens are pushed by; ``plain`` is the standardized reward, ``places`` are the prompts'."""
        return plain

    def before_step(self, step: int, prompts: Sequence[RewardPrompt], steps_per_epoch: int, answer: Answerer) -> None:  # noqa: B027
        """Called before step ``step`` (from 0) is sampled."""

    def after_step(self, step: int, scores: Float[Tensor, "rollout column"]) -> dict[str, float]:
        """Called when step ``step`` has its gradients; returns numbers for the log."""
        return {}

    def recipe(self) -> dict[str, Any]:
        """JSON-able; all that shapes the result."""
        return {"name": self.name, "template": self.template}

    def extra(self) -> dict[str, Any]:
        """Its state: nested, JSON-able but for tensors."""
        return {}

    def restore(self, extra: Mapping[str, Any]) -> None:  # noqa: B027
        """Undo `extra`."""


def check_rewards(name: str, found: Any, rollouts: Sequence[Rollout]) -> None:
    """Raises: UserError for a number of scores other than that of the answers, or one that is not finite."""
    if tuple(found.shape) != (len(rollouts),):
        raise UserError(f"The reward {name} must be one number per answer, got {tuple(found.shape)} for {len(rollouts)} answers.")
    bad = (~found.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        query = rollouts[bad[0]].prompt.query
        raise UserError(
            f"The reward {name} must be finite, got {float(found[bad[0]]):g} for an answer to {query[:40]!r} ({len(bad)} of "
            f"{len(rollouts)} answers). Mend the reward, or leave that prompt out."
        )
