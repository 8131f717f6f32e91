"""AlphaAlign as a method of groups: format and refusal by rule, helpfulness by any reward, normalized in its group."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from valign.objectives.rewards import RewardFunction
from valign.objectives.rewards.alphaalign import (
    PATTERNS,
    TEMPLATE,
    VerifiableSafety,
    final_answer,
    is_refusal,
    normalized_helpfulness,
)
from valign.objectives.rewards.verifiable import verified
from valign.training.tasks.reinforce.group_method import GroupMethod, Rollout, ScoreColumn


class AlphaAlignMethod(GroupMethod):
    """The reward is R_s, and for benign prompts R_s + R_h.

    Args:
        helpfulness: Of answers to benign prompts: it sees the query and the final answer alone, not the template or the reasoning.
            None: R_s alone (AlphaAlign-Zero).
        template: Put around each query, see `valign.objectives.rewards.alphaalign.TEMPLATE`.
    """

    name, needs = "alphaalign", ("harmful",)

    def __init__(
        self, helpfulness: RewardFunction | None, safety: VerifiableSafety | None = None, *, template: str = TEMPLATE
    ) -> None:
        self.helpfulness, self.safety, self.template = helpfulness, safety or VerifiableSafety(), template

    @property
    def columns(self) -> Mapping[str, tuple[ScoreColumn, float]]:
        return {
            "safety": (self._safety, 1.0),
            "helpfulness": (self._raw, 1.0),
            "refused": (_refused, 0.0),
            "benign": (lambda rollouts: torch.tensor([float(not one.prompt.harmful) for one in rollouts]), 0.0),
            "format": (lambda rollouts: verified(*_parts(rollouts))[0].float(), 0.0),
        }

    def combined(self, scores: Float[Tensor, "rollout column"], group: int) -> Float[Tensor, "rollout column"]:
        """The raw helpfulness replaced by R_h; 0 for harmful prompts."""
        raw, refused, benign = (scores[:, place].reshape(-1, group) for place in (1, 2, 3))
        found = scores.clone()
        found[:, 1] = (normalized_helpfulness(raw, refused > 0.5) * benign).reshape(-1)
        return found

    def recipe(self) -> dict[str, Any]:
        return {**super().recipe(), "safety": asdict(self.safety), "helpfulness": self.helpfulness is not None}

    def _safety(self, rollouts: Sequence[Rollout]) -> Float[Tensor, " rollout"]:
        return self.safety(*verified(*_parts(rollouts)))

    def _raw(self, rollouts: Sequence[Rollout]) -> Float[Tensor, " rollout"]:
        """Scores of benign prompts' answers; harmful prompts never reach the reward."""
        found = torch.zeros(len(rollouts))
        benign = [place for place, one in enumerate(rollouts) if not one.prompt.harmful]
        if self.helpfulness is not None and benign:
            prompts = [rollouts[place].prompt for place in benign]
            found[benign] = self.helpfulness(prompts, [final_answer(rollouts[place].output) for place in benign]).float().cpu()
        return found


def _parts(rollouts: Sequence[Rollout]) -> tuple[list[Any], list[str]]:
    return [one.prompt for one in rollouts], [one.output for one in rollouts]


def _refused(rollouts: Sequence[Rollout]) -> Float[Tensor, " rollout"]:
    return torch.tensor([float(is_refusal(final_answer(one.output), PATTERNS)) for one in rollouts])
