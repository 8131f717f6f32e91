"""Unlearning's usual baselines: gradient ascent, alone or beside ordinary rows, and negative preference optimization."""

from dataclasses import dataclass
from math import log
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from valign.checks import check_options, option
from valign.methods import Method
from valign.objectives.preserving.answer_tokens import AnswerTokens, TokenObjective

METHOD = Method(
    slug="npo",
    title="NPO: negative preference optimization against the model as it was",
    paper="arXiv 2404.05868",
    room="objectives",
    entry="valign.objectives.preserving.unlearning_baselines:NegativePreference",
    fidelity="exact",
    note="the sum over a sequence's tokens, and the model before unlearning as reference",
)


@dataclass(frozen=True, kw_only=True)
class GradientAscent(TokenObjective):
    """``log p(y)`` per token of a text to forget: minus its cross-entropy, without any bound.

    Raises: ValueError for a negative weight.
    """

    rows: ClassVar[Literal["forget"]] = "forget"

    retain_weight: float = option(0.0, help="weight of the cross-entropy of the rows to retain; 1 is gradient difference", low=0)

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, tokens: AnswerTokens) -> Float[Tensor, "row place"]:
        return tokens.log_probs * tokens.mask


@dataclass(frozen=True, kw_only=True)
class NegativePreference(TokenObjective):
    """``-(2 / beta) log sigmoid(-beta (log p - log ref))`` per text to forget, sums over its tokens; (2 / beta) ln 2 at the start.

    The values of `__call__` stand at each row's first trained token, so that the sum over places is the row's own.

    Raises: ValueError for a beta that is not positive, or a negative weight.
    """

    rows: ClassVar[Literal["forget"]] = "forget"

    beta: float = option(0.1, help="strength; towards 0 it is gradient ascent", above=0)
    retain_weight: float = option(1.0, help="weight of the cross-entropy of the rows to retain", low=0)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reference",)

    @property
    def at_start(self) -> float:
        """The loss while policy == reference."""
        return 2 / self.beta * log(2)

    def per_row(self, tokens: AnswerTokens) -> Float[Tensor, " row"]:
        """One value per text."""
        gap = ((tokens.log_probs - tokens.needed("reference", "NegativePreference")) * tokens.mask).sum(1)
        return 2 / self.beta * softplus(self.beta * gap)

    def __call__(self, tokens: AnswerTokens) -> Float[Tensor, "row place"]:
        return (tokens.places(per_turn=False) == 1) * self.per_row(tokens)[:, None]

    def loss(self, tokens: AnswerTokens) -> Float[Tensor, ""]:
        """The mean over the rows."""
        return self.per_row(tokens).mean()
