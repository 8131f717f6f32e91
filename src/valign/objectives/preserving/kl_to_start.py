"""Hold a model's answers close to those it gave before training: the plain penalty on the divergence."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from valign.checks import check_options, option
from valign.methods import Method
from valign.objectives.preserving.answer_tokens import AnswerTokens, TokenObjective, token_kl

METHOD = Method(
    slug="kl-to-start",
    title="KL to the start: answers to calibration prompts stay what they were",
    paper="-",
    room="objectives",
    entry="valign.objectives.preserving.kl_to_start:KlToStart",
    fidelity="exact",
    note="the whole sum over the vocabulary at each trained token of the calibration rows",
)


@dataclass(frozen=True, kw_only=True)
class KlToStart(TokenObjective):
    """``weight KL(start || policy)`` at each trained token of a calibration row, over the whole vocabulary.

    Raises: ValueError for a negative weight or another direction.
    """

    rows: ClassVar[Literal["calibration"]] = "calibration"

    weight: float = option(1.0, help="of the penalty beside the mean loss of a step", low=0)
    direction: Literal["forward", "reverse"] = option("forward", help="KL(start || policy), or KL(policy || start)", rare=True)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("words", "reference_words")

    def __call__(self, tokens: AnswerTokens) -> Float[Tensor, "row place"]:
        words, start = tokens.needed("words", "KlToStart"), tokens.needed("reference_words", "KlToStart")
        pair = (start, words) if self.direction == "forward" else (words, start)
        return self.weight * token_kl(*pair, tokens.mask)
