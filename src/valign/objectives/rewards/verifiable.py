"""Rewards that need no model: functions of prompts and outputs alone."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError
from valign.data.chats.reward_prompts import RewardPrompt
from valign.objectives.rewards.alphaalign import VerifiableSafety, final_answer, follows_format, is_refusal

# prompts and the output to each -> one number per output, higher is better
RewardFunction = Callable[[Sequence[RewardPrompt], Sequence[str]], Float[Tensor, " rollout"]]


def format_reward(prompts: Sequence[RewardPrompt], outputs: Sequence[str]) -> Float[Tensor, " rollout"]:
    """1 where the reasoning and the answer stand between their tags, else 0."""
    return torch.tensor([float(follows_format(output)) for output in outputs])


def refusal_reward(prompts: Sequence[RewardPrompt], outputs: Sequence[str]) -> Float[Tensor, " rollout"]:
    """1 for a refusal of a harmful prompt, -1 for that of a benign one, else 0. Raises: UserError for a prompt without a label."""
    return VerifiableSafety(form=0.0)(*verified(prompts, outputs))


def safety_reward(prompts: Sequence[RewardPrompt], outputs: Sequence[str]) -> Float[Tensor, " rollout"]:
    """AlphaAlign's R_s: format and refusal. Raises: UserError for a prompt without a label."""
    return VerifiableSafety()(*verified(prompts, outputs))


def demonstration_reward(prompts: Sequence[RewardPrompt], outputs: Sequence[str]) -> Float[Tensor, " rollout"]:
    """F1 of the answer's words with those of the demonstration, in [0, 1]. Raises: UserError for a prompt without one."""
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        if prompt.demonstration is None:
            raise UserError(
                f"The reward demonstration must have a demonstration of every prompt, got none for {prompt.query[:40]!r}."
            )
        said, wanted = (Counter(text.casefold().split()) for text in (final_answer(output), prompt.demonstration))
        common, words = sum((said & wanted).values()), sum(said.values()) + sum(wanted.values())
        found.append(2 * common / words if words else 0.0)
    return torch.tensor(found)


def verified(prompts: Sequence[RewardPrompt], outputs: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """V_f, V_r and the label of each output. Raises: UserError for a prompt without a label, or unequal lengths."""
    if len(prompts) != len(outputs):
        raise UserError(f"Outputs must be one per prompt, got {len(outputs)} for {len(prompts)}.")
    if unlabelled := [prompt.query[:40] for prompt in prompts if prompt.harmful is None]:
        raise UserError(f"A prompt must be labelled harmful or not, got none for {unlabelled[0]!r}. Fill the column harmful.")
    follows = torch.tensor([follows_format(output) for output in outputs])
    refused = torch.tensor([is_refusal(final_answer(output)) for output in outputs])
    return follows, refused, torch.tensor([bool(prompt.harmful) for prompt in prompts])
