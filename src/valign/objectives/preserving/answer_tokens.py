"""What a language model says about the trained tokens of some rows: the input of every token objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NOT_TRAINED = -100  # label of a token that adds nothing to the loss


@dataclass(frozen=True)
class AnswerTokens:
    """Place ``t`` of a row is the prediction of its token ``t + 1``, so a row of ``n`` ids has ``n - 1`` places.

    Shapes must be equal, for broadcasting hides bugs; half precision is refused. Nothing but ``log_probs`` and ``words`` has
    gradients. ``words`` and ``reference_words`` are log-probabilities over the vocabulary, for the objectives that need them.

    Raises: ValueError for unequal shapes, half precision, no trained token at all, or probabilities outside [0, 1] in ``safe``.
    """

    log_probs: Float[Tensor, "row place"]  # of the token that stands there, in nats; its value does not count where mask is False
    mask: Bool[Tensor, "row place"]  # which places are trained
    reference: Float[Tensor, "row place"] | None = None  # the same under the model as it was before training
    safe: Float[Tensor, "row place"] | None = None  # a guard's probability in [0, 1] that the answer so far is safe
    words: Float[Tensor, "row place word"] | None = None
    labels: Int[Tensor, "row place"] | None = None  # which word stands there; with ``words``
    reference_words: Float[Tensor, "row place word"] | None = None
    turns: Int[Tensor, "row place"] | None = None  # number of the assistant's turn, from 0; None: one turn
    polarity: Int[Tensor, " row"] | None = None  # +1: an answer to imitate, -1: one to avoid

    def __post_init__(self) -> None:
        shape = self.log_probs.shape
        for name in ("mask", "reference", "safe", "labels", "turns"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"AnswerTokens.{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}.")
        for name in ("words", "reference_words"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape[:2] != shape:
                raise ValueError(f"AnswerTokens.{name} must have shape [{shape[0]}, {shape[1]}, word], got {tuple(tensor.shape)}.")
        if self.words is not None and self.reference_words is not None and self.words.shape != self.reference_words.shape:
            raise ValueError(
                f"AnswerTokens.reference_words must have the model's vocabulary of {self.words.shape[2]} words, got "
                f"{self.reference_words.shape[2]}. The reference must share the model's tokenizer."
            )
        if self.log_probs.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"AnswerTokens.log_probs must be float32 or float64, got {self.log_probs.dtype}.")
        if not self.mask.any():
            raise ValueError("AnswerTokens.mask must train at least one token, got none. Look at the rows' answers.")
        if self.safe is not None and not ((self.safe >= 0) & (self.safe <= 1))[self.mask].all():
            raise ValueError("AnswerTokens.safe must be in [0, 1] at every trained token, got another value or NaN.")
        if self.polarity is not None and (self.polarity.shape != shape[:1] or not self.polarity.abs().eq(1).all()):
            raise ValueError(f"AnswerTokens.polarity must be +1 or -1 for each of {shape[0]} rows, got {self.polarity.tolist()}.")

    @classmethod
    def of(
        cls,
        logits: Float[Tensor, "row token word"],
        labels: Int[Tensor, "row token"],
        *,
        reference: Float[Tensor, "row place"] | None = None,
        safe: Float[Tensor, "row place"] | None = None,
        reference_words: Float[Tensor, "row place word"] | None = None,
        turns: Int[Tensor, "row place"] | None = None,
        polarity: Int[Tensor, " row"] | None = None,
        vocabulary: bool = False,
    ) -> AnswerTokens:
        """From a model's logits on whole rows. The one place where logits and labels are shifted against each other.

        Args:
            labels: The rows' own ids, `NOT_TRAINED` where nothing is trained; not shifted. The first token of a row has nothing
                before it and is never trained.
            vocabulary: Keep ``words`` and ``labels``.
        """
        wide = torch.promote_types(logits.dtype, torch.float32)
        words = logits[:, :-1].to(wide).log_softmax(2)
        said, mask = labels[:, 1:].clamp(min=0), labels[:, 1:] != NOT_TRAINED
        return cls(
            log_probs=words.gather(2, said[..., None])[..., 0].masked_fill(~mask, 0.0),
            mask=mask,
            reference=reference,
            safe=safe,
            words=words if vocabulary else None,
            labels=said if vocabulary else None,
            reference_words=reference_words,
            turns=turns,
            polarity=polarity,
        )

    def places(self, *, per_turn: bool = True) -> Int[Tensor, "row place"]:
        """Number of each trained token in its answer, from 1; 0 where nothing is trained. ``per_turn``: from 1 in every turn."""
        count = self.mask.long().cumsum(1)
        if per_turn and self.turns is not None:
            first = self.turns[:, 1:] != self.turns[:, :-1]
            before = torch.zeros_like(count)
            before[:, 1:] = torch.where(first, count[:, :-1], torch.zeros_like(count[:, :-1]))
            count = count - before.cummax(1).values
        return count * self.mask

    def needed(self, name: str, owner: str) -> Tensor:
        """The optional tensor ``name``. Raises: ValueError, naming ``owner``, if it is not there."""
        tensor: Tensor | None = getattr(self, name)
        if tensor is None:
            raise ValueError(f"{owner} must get AnswerTokens.{name}, got None. {HOW[name]}")
        return tensor


HOW = {
    "reference": "Compute the answers' log-probabilities with the model as it was before training.",
    "reference_words": "Compute the log-probabilities with the model as it was before training.",
    "safe": "Score the answers with a guard first.",
    "words": "Use AnswerTokens.of with vocabulary=True.",
    "labels": "Use AnswerTokens.of with vocabulary=True.",
    "polarity": "Say for each row whether it is to be imitated (+1) or avoided (-1).",
}


def token_mean(values: Float[Tensor, "row place"], mask: Bool[Tensor, "row place"]) -> Float[Tensor, ""]:
    """Mean over all trained tokens of all rows."""
    return (values * mask).sum() / mask.sum()


def token_kl(
    first: Float[Tensor, "row place word"],
    second: Float[Tensor, "row place word"],
    mask: Bool[Tensor, "row place"] | None = None,
) -> Float[Tensor, "row place"]:
    """``sum over words of P (log P - log Q)`` at each place; both are log-probabilities, P is ``first``. In nats, >= 0.

    Summed as ``P (log P - log Q) - P + Q``, which is >= 0 word by word, so that rounding gives nothing below 0.

    Args:
        mask: Places that count; elsewhere the value is 0, and so is every gradient. None is all.
    """
    if mask is not None:
        first, second = (torch.where(mask[..., None], words, 0.0) for words in (first, second))
    gap = first - second
    near = gap.clamp(-1, 1)  # where the difference of two large numbers would be lost in rounding
    words = torch.where(gap.abs() < 1, first.exp() * (near + torch.expm1(-near)), first.exp() * (gap - 1) + second.exp())
    return words.sum(2)


class TokenObjective:
    """A frozen dataclass of hyper-parameters that inherits from this; the call is pure and gives one value per token.

    Values are 0 where nothing is trained; `loss` is what a batch of rows costs.
    """

    rows: ClassVar[Literal["training", "calibration", "forget"]] = "training"  # which rows it is computed on

    @property
    def needs(self) -> tuple[str, ...]:
        """Optional tensors of `AnswerTokens` that it reads."""
        return ()

    def __call__(self, tokens: AnswerTokens) -> Float[Tensor, "row place"]:
        raise NotImplementedError  # abstract: each objective's formula

    def loss(self, tokens: AnswerTokens) -> Float[Tensor, ""]:
        """The mean over all trained tokens."""
        return token_mean(self(tokens), tokens.mask)
