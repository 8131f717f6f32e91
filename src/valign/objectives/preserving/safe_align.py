"""Imitate safe conversations and, if wanted, push harmful ones away with a stop (SAFE-ALIGN, arXiv 2308.09662)."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from valign.checks import check_options, option
from valign.methods import Method
from valign.objectives.preserving.answer_tokens import AnswerTokens, TokenObjective

METHOD = Method(
    slug="safe-align",
    title="SAFE-ALIGN: safe conversations imitated (A), harmful ones pushed away up to a bound (B)",
    paper="arXiv 2308.09662",
    room="objectives",
    entry="valign.objectives.preserving.safe_align:SafeAlign",
    fidelity="variant",
    note="strategy A as released; strategy B, whose code is not public, with the mean over the tokens kept by its stop",
)


class BlueRed(NamedTuple):
    """The two terms; the loss is their sum."""

    blue: Float[Tensor, ""]  # lambda1 times the mean NLL of safe answers
    red: Float[Tensor, ""]  # minus lambda2 times the mean NLL of harmful tokens below the stop, in [-lambda2 tau, 0]


@dataclass(frozen=True, kw_only=True)
class SafeAlign(TokenObjective):
    """``lambda1 NLL(blue) - lambda2 NLL(red, where nll <= tau)``: each mean over its own tokens; a row's polarity is its colour.

    Strategy A leaves the red term out. By the authors' own table B does not lower attack success, so A is the default, and B must
    be measured. A red token whose NLL is above tau is improbable enough: it has neither loss nor gradient.

    Raises: ValueError for a negative weight, a tau that is not positive, or another strategy.
    """

    rows: ClassVar[Literal["calibration"]] = "calibration"

    strategy: Literal["A", "B"] = option("A", help="A: imitate safe answers; B: also push harmful ones away")
    lambda1: float = option(1.0, help="weight of safe answers", low=0)
    lambda2: float = option(0.1, help="weight of harmful answers, strategy B", low=0, needs={"strategy": ("B",)})
    tau: float = option(1.0, help="NLL in nats up to which a harmful token is pushed away", above=0, needs={"strategy": ("B",)})
    red_start_step: int = option(
        0, help="step (from 0) at which the harmful term sets in", low=0, rare=True, needs={"strategy": ("B",)}
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("polarity",)

    def kept(self, tokens: AnswerTokens) -> Bool[Tensor, "row place"]:
        """Tokens that count: all of blue rows, of red rows those with NLL <= tau (none with strategy A)."""
        red = self._red(tokens)
        below = (-tokens.log_probs.detach() <= self.tau) & (self.strategy == "B")
        return tokens.mask & torch.where(red, below, True)

    def parts(self, tokens: AnswerTokens) -> BlueRed:
        red, kept, nll = self._red(tokens), self.kept(tokens), -tokens.log_probs

        def mean(counted: Bool[Tensor, "row place"]) -> Float[Tensor, ""]:
            return torch.where(counted, nll, 0.0).sum() / counted.sum().clamp(min=1)

        return BlueRed(self.lambda1 * mean(kept & ~red), -self.lambda2 * mean(kept & red))

    def __call__(self, tokens: AnswerTokens) -> Float[Tensor, "row place"]:
        """Weighted NLL per token, before each term's own mean."""
        signed = torch.where(self._red(tokens), -self.lambda2, self.lambda1)
        return torch.where(self.kept(tokens), signed * -tokens.log_probs, 0.0)

    def loss(self, tokens: AnswerTokens) -> Float[Tensor, ""]:
        """The sum of both terms."""
        blue, red = self.parts(tokens)
        return blue + red

    def _red(self, tokens: AnswerTokens) -> Bool[Tensor, "row 1"]:
        return (tokens.needed("polarity", "SafeAlign") < 0)[:, None]
