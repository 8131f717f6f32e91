"""Groups of answers to one prompt: rewards relative to the group's mean."""

from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError

EPSILON = 1e-4  # trl's, beside the standard deviation


def standardized(rewards: Float[Tensor, " rollout"], group: int) -> Float[Tensor, " rollout"]:
    """``(R - mean) / (std + 1e-4)`` within each ``group`` consecutive rollouts, std being the sample's; 0 where all are equal.

    Raises: UserError for a group of one, a number of rollouts that groups do not divide, or a reward that is not finite.
    """
    if group < 2:
        raise UserError(f"A group must have at least 2 answers, got {group}: nothing can be compared. Raise --group.")
    if len(rewards) % group:
        raise UserError(f"Rollouts must come in whole groups of {group}, got {len(rewards)}.")
    if not bool(rewards.isfinite().all()):
        raise UserError(f"Rewards must be finite, got {int((~rewards.isfinite()).sum())} that are not. Check the reward.")
    grouped = rewards.reshape(-1, group)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + EPSILON)).reshape(-1)
