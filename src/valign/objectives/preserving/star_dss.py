"""Learn safe stretches of an answer, pull unsafe ones to the aligned model (STAR-DSS, arXiv 2505.17196)."""

import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from valign.checks import check_choice, check_options, check_range, option
from valign.methods import Method
from valign.objectives.preserving.answer_tokens import AnswerTokens, TokenObjective, token_kl

METHOD = Method(
    slug="star-dss",
    title="STAR-DSS: a guard's score of each stretch decides between learning and anchoring",
    paper="arXiv 2505.17196",
    room="objectives",
    entry="valign.objectives.preserving.star_dss:StarDSS",
    fidelity="variant",
    note="equation 3 and its estimators as released; chunks are cut on the text's own words, so that boundaries are exact",
)

Estimator = Literal["k1", "k2", "k3", "full"]


class ShapedLoss(NamedTuple):
    """The two parts of equation 3; their sum is the loss of each token."""

    learned: Float[Tensor, "row place"]  # V CE
    anchored: Float[Tensor, "row place"]  # (1 - V) kl_scale KL


def kl_estimate(
    policy: Float[Tensor, "row place"], reference: Float[Tensor, "row place"], estimator: str
) -> Float[Tensor, "row place"]:
    """Of KL(policy || reference) on the tokens that stand there, with ``d = policy - reference`` in nats.

    ``k2`` is ``d^2 / 2``, ``k3`` is ``exp(-d) - 1 + d``, ``k1`` is ``d``, whose mean can be negative.
    """
    check_choice("kl_estimate.estimator", estimator, ("k1", "k2", "k3"))
    gap = policy - reference
    if estimator == "k1":
        return gap
    return gap.square() / 2 if estimator == "k2" else torch.expm1(-gap) + gap


@dataclass(frozen=True, kw_only=True)
class StarDSS(TokenObjective):
    """``V_t CE_t + (1 - V_t) kl_scale KL_t`` per trained token, with V_t the guard's score of the token's chunk.

    V = 1 is plain fine-tuning, V = 0 only the anchor. ``k2`` and ``k3`` have no gradient at policy == reference.

    Raises: ValueError for a negative ``kl_scale`` or another estimator.
    """

    kl_scale: float = option(0.5, help="weight of the anchor, lambda_KL", low=0)
    estimator: Estimator = option(
        "k2", help="of the divergence from the aligned model; full sums over the vocabulary, k1 is signed and pulls nowhere"
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("safe", "words", "reference_words") if self.estimator == "full" else ("safe", "reference")

    def parts(self, tokens: AnswerTokens) -> ShapedLoss:
        safe = tokens.needed("safe", "StarDSS")
        if self.estimator == "full":
            divergence = token_kl(tokens.needed("words", "StarDSS"), tokens.needed("reference_words", "StarDSS"), tokens.mask)
        else:
            divergence = kl_estimate(tokens.log_probs, tokens.needed("reference", "StarDSS"), self.estimator)
        learned = torch.where(tokens.mask, safe * -tokens.log_probs, 0.0)
        return ShapedLoss(learned, torch.where(tokens.mask, (1 - safe) * self.kl_scale * divergence, 0.0))

    def __call__(self, tokens: AnswerTokens) -> Float[Tensor, "row place"]:
        return sum(self.parts(tokens))  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class StaticShaping(TokenObjective):
    """The baseline: an answer is learned whole or not at all, by one verdict on it: ``[V_last >= threshold] CE_t``.

    The mean counts the tokens of rejected answers too.
    """

    threshold: float = option(0.5, help="least score of the whole answer that is learned", low=0, high=1)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("safe",)

    def __call__(self, tokens: AnswerTokens) -> Float[Tensor, "row place"]:
        safe = tokens.needed("safe", "StaticShaping")
        last = (tokens.mask * torch.arange(1, safe.shape[1] + 1, device=safe.device)).argmax(1, keepdim=True)
        return (safe.gather(1, last) >= self.threshold) * tokens.mask * -tokens.log_probs


def star_score(safe: Float[Tensor, "*rest"], unsafe: Float[Tensor, "*rest"]) -> Float[Tensor, "*rest"]:
    """V of one guard from its logits for the two answer words: ``sigmoid(safe - unsafe)``, in (0, 1)."""
    return torch.sigmoid(safe - unsafe)


def chunk_texts(text: str, size: int = 5) -> list[tuple[str, int]]:
    """Growing starts of an answer, ``size`` words longer each, as ``(start, characters of the text that it covers)``.

    Each is a start of the text itself, with its own line breaks; the last is the whole text.
    Raises: ValueError for an empty text or a ``size`` below 1.
    """
    check_range("chunk_texts.size", size, low=1)
    ends = [place for place in range(1, len(text) + 1) if not text[place - 1].isspace() and text[place : place + 1].strip() == ""]
    if not ends:
        raise ValueError("chunk_texts.text must hold a word, got a blank text. Leave out rows without an answer.")
    cuts = [*ends[size - 1 : -1 : size], len(text)] if len(ends) > size else [len(text)]
    return [(text[:cut], cut) for cut in cuts]


def star_weights(scores: Float[Tensor, " chunk"], boundaries: Int[Tensor, " chunk"], *, length: int) -> Float[Tensor, " token"]:
    """V of every token of a row from the scores of its chunks.

    Args:
        scores: In [0, 1].
        boundaries: Number of tokens of prompt and answer up to the end of each chunk, ascending; those that repeat, and the
            padding value -1, are left out. Tokens before the first boundary, the prompt's among them, have the first score: the
            mask decides what is trained.
        length: Tokens of the row; those behind the last boundary have the last score.
    Raises: ValueError for scores outside [0, 1] or NaN, or boundaries that fall or lie beyond the row.
    """
    if scores.shape != boundaries.shape or not len(scores):
        raise ValueError(f"star_weights must get a boundary per score, got {len(scores)} scores and {len(boundaries)} boundaries.")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError("star_weights.scores must be in [0, 1], got another value or NaN. Look at the guard.")
    kept = boundaries >= 0
    scores, boundaries = scores[kept], boundaries[kept]
    if (boundaries.diff() < 0).any() or not len(boundaries) or boundaries[-1] > length:
        raise ValueError(f"star_weights.boundaries must rise to at most {length}, got {boundaries.tolist()}.")
    if boundaries[-1] < length:
        warnings.warn(f"{length - int(boundaries[-1])} tokens behind the last chunk have its score.", stacklevel=2)
    place = torch.searchsorted(boundaries, torch.arange(length, device=boundaries.device), right=True)
    return scores[place.clamp(max=len(scores) - 1)]
