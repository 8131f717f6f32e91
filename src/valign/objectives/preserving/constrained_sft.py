"""Fine-tune with the first answer tokens held close to the aligned model (constrained SFT, arXiv 2406.05946)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import check_options, option
from valign.methods import Method
from valign.objectives.preserving.answer_tokens import AnswerTokens, TokenObjective

METHOD = Method(
    slug="constrained-sft",
    title="Constrained SFT: the first answer tokens stay close to the aligned model",
    paper="arXiv 2406.05946",
    room="objectives",
    entry="valign.objectives.preserving.constrained_sft:ConstrainedSFT",
    fidelity="exact",
    note="the released trainer's weighted form and clamp; the place is counted anew in every assistant turn (per_turn)",
)


@dataclass(frozen=True, kw_only=True)
class ConstrainedSFT(TokenObjective):
    """``w_t * (-log p_t)`` with ``w_t = max(2 (1 - sigmoid(beta_t (log p_t - log ref_t))), min_weight)``, detached.

    Its gradient is that of ``(2 / beta_t) softplus(beta_t (log ref_t - log p_t))`` wherever the clamp does not act. At
    policy == reference every weight is 1, so it is plain cross-entropy. The value cannot be compared with cross-entropy.

    Raises: ValueError for a beta or factor that is not positive, a negative ``bias_length``, or a ``min_weight`` outside [0, 1].
    """

    beta: float = option(0.1, help="strength of the constraint on late tokens, 1 / nat", above=0)
    bias_factor: float = option(20.0, help="times beta, for the first bias_length tokens", above=0)
    first_token_bias_factor: float = option(5.0, help="times beta, for the very first token, whose loss starts high", above=0)
    bias_length: int = option(5, help="tokens of an answer that are held harder; 0: all alike", low=0)
    min_weight: float = option(1e-3, help="least weight of a token", low=0, high=1, rare=True)
    per_turn: bool = option(True, help="count tokens from 1 in every assistant turn, not once per row", rare=True)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reference",)

    def betas(self, count: int) -> Float[Tensor, " count"]:
        """beta_t of the tokens 1 to ``count`` of an answer, float64."""
        factors = torch.ones(count, dtype=torch.float64)
        factors[: self.bias_length] = self.bias_factor
        factors[: min(1, self.bias_length)] = self.first_token_bias_factor
        return self.beta * factors

    def weights(self, tokens: AnswerTokens) -> Float[Tensor, "row place"]:
        """w_t in [min_weight, 2], without gradients; 0 where nothing is trained."""
        reference = tokens.needed("reference", "ConstrainedSFT")
        places = tokens.places(per_turn=self.per_turn)
        betas = torch.cat([torch.zeros(1, dtype=torch.float64), self.betas(int(places.max()))])
        gap = betas.to(reference)[places] * (tokens.log_probs.detach() - reference)
        return (2 * torch.sigmoid(-gap)).clamp(min=self.min_weight) * tokens.mask

    def __call__(self, tokens: AnswerTokens) -> Float[Tensor, "row place"]:
        return self.weights(tokens) * -tokens.log_probs
