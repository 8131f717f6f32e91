"""A reward per harm category learnt from demonstrations, and advantages that weigh hard prompts more (DR-IRL, GRPO-S)."""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from valign.checks import UserError, check_options, check_range, option
from valign.methods import Method

METHOD = Method(
    slug="dr-irl",
    title="DR-IRL: a shadow reward per category by inverse reinforcement learning, and difficulty-scaled GRPO",
    paper="arXiv 2503.18991",
    room="objectives",
    entry="valign.objectives.rewards.dr_irl:ShadowReward",
    fidelity="variant",
    note="the formulas as notes on the paper give them; rounds, rates and tau are ours; one policy for all categories",
)

SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")
PART = re.compile(r"(?<=[,:])\s+")
LONG = 12  # words of a sentence that is cut further, at its commas


@dataclass(frozen=True, kw_only=True)
class ShadowReward:
    """The step of the reward in maximum-likelihood inverse reinforcement learning: demonstrations above what the policy says.

    ``linear`` is ``-(r(y) - r(y')) / beta + l2 (r(y)^2 + r(y')^2)``; ``logistic`` is ``-log sigmoid(r(y) - r(y'))`` with the same
    regularization, without which the linear one has no minimum.
    """

    form: Literal["logistic", "linear"] = option("logistic", help="of the loss; the linear one is the paper's objective")
    beta: float = option(
        0.1, help="strength of the policy's KL term in the bi-level problem, which divides the linear loss", above=0
    )
    l2: float = option(1e-3, help="weight of the squared rewards", low=0)

    def __post_init__(self) -> None:
        check_options(self)
        if self.form == "linear" and self.l2 == 0:
            raise ValueError(
                "ShadowReward.l2 must be in (0, inf) with the linear form, got 0. Without it the reward grows for ever."
            )

    def __call__(self, demonstrated: Float[Tensor, " pair"], sampled: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        """One loss per demonstration and answer of the policy to the same prompt."""
        gap = demonstrated - sampled
        fit = -gap / self.beta if self.form == "linear" else -logsigmoid(gap)
        return fit + self.l2 * (demonstrated.square() + sampled.square())


def clauses(text: str) -> list[str]:
    """Sentences, and the parts between the commas of a long one; none of an empty text."""
    found = []
    for sentence in SENTENCE.split(text):
        found += PART.split(sentence) if len(sentence.split()) > LONG else [sentence]
    return [clause.strip() for clause in found if clause.strip()]


def distance(answer: Float[Tensor, "clause width"], demonstration: Float[Tensor, "other width"]) -> float:
    """delta = 1 - W, W the mean over the answer's clauses of the cosine to the nearest clause of the demonstration; in [0, 2].

    It is not symmetric. An empty answer is like nothing: W = 0.
    Raises: UserError for a demonstration without clauses, or an embedding of length 0.
    """
    if not len(demonstration):
        raise UserError("A demonstration must have at least one clause, got an empty text. Write it, or delete the row.")
    if not len(answer):
        return 1.0
    lengths = torch.cat([answer, demonstration]).norm(dim=1)
    if not bool((lengths > 0).all()):
        raise UserError(
            f"Embeddings of clauses must have a length above 0, got {int((lengths == 0).sum())} of 0. Check the encoder."
        )
    cosines = (answer / answer.norm(dim=1, keepdim=True)) @ (demonstration / demonstration.norm(dim=1, keepdim=True)).T
    return float(1 - cosines.max(dim=1).values.mean())


def data_hardness(delta: Float[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
    """alpha^D = sigmoid(delta) / sigmoid(mean delta) over the prompts of one category; within (0.567, 1.762) for delta in [0, 2].

    Raises: UserError for fewer than two prompts.
    """
    if len(delta) < 2:
        raise UserError(
            f"A category must have at least 2 prompts with demonstrations, got {len(delta)}. Add some, or leave it out."
        )
    return delta.sigmoid() / delta.mean().sigmoid()


def responsiveness(gap: Float[Tensor, " prompt"], *, tau: float | None = None) -> float:
    """alpha^M = sigmoid(mean kept gap) / sigmoid(mean gap) of one category.

    Args:
        gap: Shadow reward of the demonstration less that of the policy's answer, per prompt.
        tau: Gaps with ``(gap - mean)^2 > tau`` are dropped; None is 9 times their variance. In squared units of the reward, >= 0.
    Returns: > 0; 1 where everything would be dropped.
    Raises: UserError for a gap that is not finite; ValueError for a negative tau.
    """
    if tau is not None:
        check_range("responsiveness.tau", tau, low=0)
    if not bool(gap.isfinite().all()):
        raise UserError("Gaps of the shadow reward must be finite, got some that are not. Lower its learning rate.")
    mean = gap.mean()
    squared = (gap - mean).square()
    kept = gap[squared <= (9 * squared.mean() if tau is None else tau)]
    return 1.0 if not len(kept) else float(kept.mean().sigmoid() / mean.sigmoid())


def scaled_advantages(advantages: Float[Tensor, " rollout"], alpha: Float[Tensor, " rollout"]) -> Float[Tensor, " rollout"]:
    """GRPO-S: each rollout's advantage times its prompt's coefficient, a constant.

    Scaling the rewards instead would change nothing: a group is standardized.

    Raises: UserError for a coefficient that is not above 0.
    """
    if alpha.shape != advantages.shape or not bool((alpha > 0).all()):
        raise UserError(
            f"Difficulty coefficients must be above 0, one per rollout, got {len(alpha)} for {len(advantages)}, of them "
            f"{int((~(alpha > 0)).sum())} not above 0."
        )
    return advantages * alpha.detach()
