"""Unlearn without collapse: lower a token until the next likeliest has its place (inverted hinge loss, arXiv 2408.06621)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import check_options, option
from valign.methods import Method
from valign.objectives.preserving.answer_tokens import AnswerTokens, TokenObjective

METHOD = Method(
    slug="ihl",
    title="IHL: an inverted hinge that unlearns a text and stops by itself",
    paper="arXiv 2408.06621",
    room="objectives",
    entry="valign.objectives.preserving.inverted_hinge:InvertedHinge",
    fidelity="exact",
    note="the released loss, with the softmax always applied; the ordinary rows are the retain set",
)


@dataclass(frozen=True, kw_only=True)
class InvertedHinge(TokenObjective):
    """``1 + p(y) - max over v != y of p(v)`` per token of a text to forget, in [0, 2]; 2 p(y) for two words.

    Its gradient vanishes as p(y) falls and another word takes its place, so it stops by itself. It goes with ordinary
    cross-entropy on rows to retain, times ``retain_weight``.

    Raises: ValueError for a negative weight.
    """

    rows: ClassVar[Literal["forget"]] = "forget"

    retain_weight: float = option(1.0, help="weight of the cross-entropy of the rows to retain", low=0)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("words", "labels")

    def __call__(self, tokens: AnswerTokens) -> Float[Tensor, "row place"]:
        words, labels = tokens.needed("words", "InvertedHinge"), tokens.needed("labels", "InvertedHinge")
        if words.shape[2] < 2:
            raise ValueError(f"InvertedHinge must have a vocabulary of 2 words or more, got {words.shape[2]}.")
        others = words.scatter(2, labels[..., None], -torch.inf).max(2).values
        return torch.where(tokens.mask, 1 + words.gather(2, labels[..., None])[..., 0].exp() - others.exp(), 0.0)
