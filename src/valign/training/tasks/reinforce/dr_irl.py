"""DR-IRL as a method of groups: rewards routed by category, advantages scaled by how hard a prompt is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError
from valign.data.chats.reward_prompts import RewardPrompt
from valign.objectives.rewards import RewardFunction
from valign.objectives.rewards.dr_irl import clauses, data_hardness, distance, responsiveness, scaled_advantages
from valign.training.tasks.reinforce.group_method import Answerer, GroupMethod, Rollout, ScoreColumn

TextEncoder = Callable[[Sequence[str]], Float[Tensor, "text width"]]


class DrIrlMethod(GroupMethod):
    """Prompts with a category are scored by its shadow reward, others by ``helpfulness``, with a coefficient of 1.

    Args:
        shadow: A frozen reward per category, of the user's query and an answer.
        encoder: Of sentences, for the distance between clauses.
        scaled: False leaves every coefficient at 1 (an ablation): plain GRPO on the shadow rewards.
        tau: See `valign.objectives.rewards.dr_irl.responsiveness`.
    """

    name = "dr-irl"

    def __init__(
        self,
        shadow: Mapping[str, RewardFunction],
        helpfulness: RewardFunction | None,
        encoder: TextEncoder,
        *,
        scaled: bool = True,
        tau: float | None = None,
    ) -> None:
        self.shadow, self.helpfulness, self.encoder, self.scaled, self.tau = shadow, helpfulness, encoder, scaled, tau
        self.alpha = torch.zeros(0)  # of each prompt; none yet

    @property
    def columns(self) -> Mapping[str, tuple[ScoreColumn, float]]:
        return {"shadow": (self._routed, 1.0)}

    def before_step(self, step: int, prompts: Sequence[RewardPrompt], steps_per_epoch: int, answer: Answerer) -> None:
        """At the start of each epoch the policy answers every prompt with a demonstration, and the coefficients are new."""
        if not len(self.alpha):
            check_categories(prompts, self.shadow, self.helpfulness)
        if not len(self.alpha) or (self.scaled and step % steps_per_epoch == 0):
            self.alpha = self._coefficients(prompts, answer) if self.scaled else torch.ones(len(prompts))

    def advantages(
        self, plain: Float[Tensor, " rollout"], scores: Float[Tensor, "rollout column"], places: Sequence[int], group: int
    ) -> Float[Tensor, " rollout"]:
        return scaled_advantages(plain, self.alpha[list(places)].to(plain))

    def after_step(self, step: int, scores: Float[Tensor, "rollout column"]) -> dict[str, float]:
        return {"alpha_least": float(self.alpha.min()), "alpha_most": float(self.alpha.max())}

    def recipe(self) -> dict[str, Any]:
        return {**super().recipe(), "categories": sorted(self.shadow), "scaled": self.scaled, "tau": self.tau}

    def extra(self) -> dict[str, Any]:
        return {"alpha": self.alpha}

    def restore(self, extra: Mapping[str, Any]) -> None:
        self.alpha = extra["alpha"]

    def _routed(self, rollouts: Sequence[Rollout]) -> Float[Tensor, " rollout"]:
        found = torch.zeros(len(rollouts))
        for category in sorted({_route(one.prompt) or "" for one in rollouts}):
            places = [place for place, one in enumerate(rollouts) if (_route(one.prompt) or "") == category]
            reward = self.shadow[category] if category else self.helpfulness
            assert reward is not None
            found[places] = reward([rollouts[p].prompt for p in places], [rollouts[p].output for p in places]).float().cpu()
        return found

    def _coefficients(self, prompts: Sequence[RewardPrompt], answer: Answerer) -> Float[Tensor, " prompt"]:
        alpha = torch.ones(len(prompts))
        for category in sorted(self.shadow):
            places = [place for place, prompt in enumerate(prompts) if _route(prompt) == category]
            if not places:
                continue
            mine = [prompts[place] for place in places]
            said, shown = answer(mine), [str(prompt.demonstration) for prompt in mine]
            delta = torch.tensor([self._distance(one, other) for one, other in zip(said, shown)], dtype=torch.float64)
            gap = self.shadow[category](mine, shown) - self.shadow[category](mine, said)
            alpha[places] = (data_hardness(delta) * responsiveness(gap.double(), tau=self.tau)).float()
        return alpha

    def _distance(self, answer: str, demonstration: str) -> float:
        said, shown = clauses(answer), clauses(demonstration)
        vectors = self.encoder([*said, *shown])
        return distance(vectors[: len(said)], vectors[len(said) :])


def _route(prompt: RewardPrompt) -> str | None:
    """The category whose shadow reward a prompt has; None without a demonstration."""
    return prompt.category if prompt.demonstration is not None and prompt.harmful else None


def balanced(prompts: Sequence[RewardPrompt]) -> dict[str, list[RewardPrompt]]:
    """Demonstrations of each category, equally many: the first ones of each, as many as the smallest has.

    Raises: UserError without any, or for a category with fewer than two.
    """
    found: dict[str, list[RewardPrompt]] = {}
    for prompt in prompts:
        if category := _route(prompt):
            found.setdefault(category, []).append(prompt)
    if not found:
        raise UserError("dr-irl must have harmful prompts with a category and a demonstration, got none. Fill these columns.")
    least = min(found, key=lambda name: len(found[name]))
    if len(found[least]) < 2:
        raise UserError(f"dr-irl must have at least 2 demonstrations in each category, got {len(found[least])} of {least}.")
    return {category: found[category][: len(found[least])] for category in sorted(found)}


def check_categories(
    prompts: Sequence[RewardPrompt], shadow: Mapping[str, RewardFunction], helpfulness: RewardFunction | None
) -> None:
    """Raises: UserError for a prompt whose category has no shadow reward, or that has neither demonstration nor another reward."""
    for number, prompt in enumerate(prompts, start=1):
        category = _route(prompt)
        if category is not None and category not in shadow:
            known = ", ".join(sorted(shadow))
            raise UserError(f"Row {number} must have a category of {known}; got {category!r}. Add demonstrations of it.")
        if category is None and helpfulness is None:
            raise UserError(
                f"Row {number} must have a category and a demonstration, or --reward must score it, got neither for "
                f"{prompt.query[:40]!r}."
            )
