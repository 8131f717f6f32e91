"""Retrieval by contrast: each question against all contexts of the batch (DPR's loss, as Guide-Align uses it, arXiv 2403.11838)."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy


def in_batch_softmax(
    queries: Float[Tensor, "question dim"],
    contexts: Float[Tensor, "context dim"],
    positive: Int[Tensor, " question"],
) -> Float[Tensor, " question"]:
    """``-log softmax(q C^T)[positive]`` for each question; ``ln(context)`` where all vectors are 0.

    Args:
        contexts: Distinct texts, two or more: the positives of all questions, and further negatives.
        positive: Row of ``contexts`` that is right, for each question.
    Raises: ValueError for one context alone: the loss would be 0 whatever the vectors are.
    """
    if len(contexts) < 2:
        raise ValueError(f"in_batch_softmax.contexts must hold 2 or more, got {len(contexts)}. Add negatives, or a larger batch.")
    return cross_entropy(queries @ contexts.T, positive, reduction="none")
