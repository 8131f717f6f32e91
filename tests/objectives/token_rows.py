"""Answers of small random language models, as token objectives read them."""

import torch

from valign.objectives import AnswerTokens


def rows(seed=0, *, count=3, length=6, size=5, dtype=torch.float64):
    """Random logits of a policy and a reference, and labels in which the first two tokens and one end are not trained."""
    generator = torch.Generator().manual_seed(seed)
    logits, reference = torch.randn(2, count, length, size, generator=generator, dtype=dtype)
    labels = torch.randint(0, size, (count, length), generator=generator)
    labels[:, :2] = -100
    labels[0, -1] = -100
    return logits, reference, labels


def tokens_of(logits, reference, labels, **more):
    known = AnswerTokens.of(reference, labels, vocabulary=True)
    return AnswerTokens.of(
        logits, labels, reference=known.log_probs.detach(), reference_words=known.words.detach(), vocabulary=True, **more
    )
