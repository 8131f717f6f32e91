"""Helpfulness under a limit on expected harm: reward and cost losses, the multiplier, and PPO on both advantages (Safe RLHF-V)."""

from dataclasses import dataclass
from math import exp, log

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from valign.checks import UserError, check_options, check_range, option
from valign.methods import Method

METHOD = Method(
    slug="safe-rlhf-v",
    title="Safe RLHF-V: reward and cost models from two preferences, PPO with a Lagrange multiplier, a guard loop",
    paper="arXiv 2503.17682",
    room="objectives",
    entry="valign.objectives.rewards.safe_rlhf:Multiplier",
    fidelity="variant",
    note="the reference code's formulas with the true response mask; the critic-free variant and damping (off) are additions",
)

TOKEN_LIMIT = 50.0  # of a token's reward and cost


# ---- reward and cost models ------------------------------------------------------------------------------------------


def reward_loss(better: Float[Tensor, " pair"], worse: Float[Tensor, " pair"], *, l2: float = 1e-3) -> Float[Tensor, " pair"]:
    """``-log sigmoid(R_b - R_w) + l2 (R_b^2 + R_w^2) / 2`` per pair, so that the mean is the reference's over all scores."""
    return -logsigmoid(better - worse) + l2 * (better.square() + worse.square()) / 2


def cost_loss(
    high: Float[Tensor, " pair"],
    low: Float[Tensor, " pair"],
    sign_high: Float[Tensor, " pair"],
    sign_low: Float[Tensor, " pair"],
    *,
    scale: float = 1.0,
    l2: float = 1e-3,
) -> Float[Tensor, " pair"]:
    """``-log sigmoid(C_hi - C_lo) - scale (log sigmoid(s_hi C_hi) + log sigmoid(s_lo C_lo)) + l2 (C_hi^2 + C_lo^2) / 2``.

    Args:
        high: Cost of the less safe answer of each pair; higher is more harmful, 0 the boundary.
        low: Cost of the safer one.
        sign_high: Minus its harmless rate: above 0 is harmful; only the sign, or the severity as well.
        sign_low: That of the safer one.
    """
    boundary = logsigmoid(sign_high * high) + logsigmoid(sign_low * low)
    return -logsigmoid(high - low) - scale * boundary + l2 * (high.square() + low.square()) / 2


# ---- the multiplier --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Multiplier:
    """lambda of ``max E[R] s.t. E[C] <= limit``, moved in its logarithm: ``eta += rate lambda (J_C - limit)``, capped.

    By this rule alone policy and multiplier go round the limit: lambda is highest when the cost is back at it. What is applied is
    ``exp(eta + damping (J_C - limit))``, capped too, which turns back earlier (the proportional part of Stooke et al., arXiv
    2007.03964); ``damping`` 0 is the paper's rule.

    Raises: ValueError for ``start`` outside (0, ``highest``], or a negative ``rate`` or ``damping``.
    """

    start: float = option(10.0, help="lambda before the first update", above=0)
    highest: float = option(20.0, help="lambda never exceeds it: the bound on how much the cost may dominate", above=0)
    rate: float = option(0.1, help="learning rate of log lambda", low=0)
    limit: float = option(-0.5, help="d: what the mean cost of an answer may be, in the cost model's unit")
    window: int = option(128, help="latest episodes that the mean cost is taken over", low=1)
    delay: int = option(1, help="steps before the first update", low=0)
    damping: float = option(0.0, help="how much the latest excess of the cost over the limit adds to log lambda", low=0, rare=True)

    def __post_init__(self) -> None:
        check_options(self)
        check_range("Multiplier.start", self.start, above=0, high=self.highest, hint="It must not exceed highest.")

    def updated(self, value: float, costs: Float[Tensor, " episode"], step: int) -> float:
        """lambda after step ``step`` (from 0), in (0, ``highest``].

        Args:
            value: lambda before.
            costs: Raw costs of the latest episodes, oldest first.
        Raises: UserError without a cost, or for one that is not finite.
        """
        if step < self.delay:
            return value
        return min(exp(log(value) + self.rate * value * self._excess(costs)), self.highest)

    def applied(self, value: float, costs: Float[Tensor, " episode"]) -> float:
        """What weighs the cost's advantages: lambda with its damping, in (0, ``highest``]; lambda itself before the first cost."""
        if not self.damping or not len(costs):
            return value
        return exp(min(log(value) + self.damping * self._excess(costs), log(self.highest)))

    def _excess(self, costs: Float[Tensor, " episode"]) -> float:
        if not len(costs):
            raise UserError("Multiplier must have the cost of at least one answer, got none. Generate before the first update.")
        if not torch.isfinite(costs).all():
            raise UserError("Costs must be finite, got some that are not. Check the cost model.")
        return float(costs[-self.window :].mean()) - self.limit


def lagrangian_advantages(
    reward: Float[Tensor, "*shape"], cost: Float[Tensor, "*shape"], multiplier: float
) -> Float[Tensor, "*shape"]:
    """``(A_R - lambda A_C) / (1 + lambda)``: PPO on the reward at lambda 0, on minus the cost as lambda grows."""
    return (reward - multiplier * cost) / (1 + multiplier)


# ---- PPO -------------------------------------------------------------------------------------------------------------


def token_signals(
    kl: Float[Tensor, "row token"],
    reward: Float[Tensor, " row"],
    cost: Float[Tensor, " row"],
    mask: Bool[Tensor, "row token"],
    *,
    weight: float = 0.02,
) -> tuple[Float[Tensor, "row token"], Float[Tensor, "row token"]]:
    """Reward and cost of each token: ``-weight kl`` and ``+weight kl``, and at the answer's last token R and C as well; clamped.

    Args:
        kl: ``log pi_old - log pi_ref`` of each token of the answers.
        mask: Tokens of the answers, which may be followed by padding.
        weight: k_kl. It enters the joint advantage with this weight at every lambda.
    Raises: UserError for an empty answer, or a score that is not finite.
    """
    if not bool(mask.any(dim=1).all()):
        raise UserError(
            f"Answers must have at least one token, got {int((~mask.any(dim=1)).sum())} without. Raise --answer-tokens."
        )
    if not bool((reward.isfinite() & cost.isfinite()).all()):
        raise UserError("Rewards and costs must be finite, got some that are not. Check the reward and cost models.")
    places = torch.arange(mask.shape[1], device=mask.device)
    last = places == (mask * places).max(dim=1, keepdim=True).values
    signals = (-weight * kl + last * reward[:, None], weight * kl + last * cost[:, None])
    return tuple((signal * mask).clamp(-TOKEN_LIMIT, TOKEN_LIMIT) for signal in signals)  # type: ignore[return-value]


def estimated_advantages(
    signals: Float[Tensor, "row token"],
    values: Float[Tensor, "row token"],
    mask: Bool[Tensor, "row token"],
    *,
    gamma: float = 1.0,
    gae: float = 0.95,
) -> tuple[Float[Tensor, "row token"], Float[Tensor, "row token"]]:
    """Generalized advantage estimates and returns of each token; the value beyond the last token is 0, and so is all padding."""
    signals, values = signals * mask, values * mask
    found = torch.zeros_like(values)
    carried = values.new_zeros(len(values))
    for token in reversed(range(values.shape[1])):
        following = values[:, token + 1] if token + 1 < values.shape[1] else torch.zeros_like(carried)
        carried = signals[:, token] + gamma * following - values[:, token] + gamma * gae * carried
        found[:, token] = carried
    found = found * mask
    return found, (found + values) * mask


def _sequence_mean(losses: Float[Tensor, "row token"], mask: Bool[Tensor, "row token"]) -> Float[Tensor, ""]:
    """The mean over rows of the mean over each row's own tokens."""
    return ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def actor_loss(
    log_probs: Float[Tensor, "row token"],
    old: Float[Tensor, "row token"],
    advantages: Float[Tensor, "row token"],
    mask: Bool[Tensor, "row token"],
    *,
    clip: float = 0.2,
) -> Float[Tensor, ""]:
    """PPO's clipped loss of the policy; minus the mean advantage where nothing has moved."""
    ratio = (log_probs - old).masked_fill(~mask, 0.0).exp()
    lower = torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - clip, 1 + clip))
    return -_sequence_mean(lower, mask)


def critic_loss(
    values: Float[Tensor, "row token"],
    old: Float[Tensor, "row token"],
    returns: Float[Tensor, "row token"],
    mask: Bool[Tensor, "row token"],
    *,
    clip: float = 5.0,
) -> Float[Tensor, ""]:
    """Half the mean of the larger squared error of the value and of the value clipped to ``old +- clip``."""
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * _sequence_mean(torch.maximum((values - returns).square(), (clipped - returns).square()), mask)
