"""Inception score from a classifier's probabilities: sure of each image, and of all classes over all images (arXiv 1606.03498).

With a world's oracle instead of Inception it is a score of that world: comparable within one classifier only.
"""

import numpy as np
from jaxtyping import Float

from valign.checks import UserError
from valign.methods import Method

METHOD = Method(
    slug="inception-score",
    title="Inception score from given class probabilities",
    paper="arXiv 1606.03498",
    room="evaluation",
    entry="valign.evaluation.images.inception_score:inception_score",
    fidelity="exact",
    note="the formula; with a world's oracle in the place of Inception it is a score of that world",
)


def inception_score(probabilities: Float[np.ndarray, "image class"], *, splits: int = 1) -> tuple[float, float]:
    """``exp(mean_i KL(p_i || mean_j p_j))``, mean and standard deviation over ``splits`` equal parts in the order given.

    From 1 (every image alike, or none told apart) to the number of classes. Splits of 10 are the paper's, for 50000 images; a
    split's own mean is biased downwards when it is small, so compare sets of one size.

    Raises: UserError if rows are not probabilities, or fewer than ``splits``.
    """
    values = np.asarray(probabilities, dtype=np.float64)
    if splits < 1 or len(values) < splits:
        raise UserError(f"inception_score.splits must be in [1, {len(values)}], the number of images, got {splits}.")
    if not ((values >= 0) & (values <= 1)).all() or not np.allclose(values.sum(1), 1, atol=1e-4):
        raise UserError("inception_score.probabilities must be rows in [0, 1] that sum to 1. Apply a softmax to logits first.")
    size = len(values) // splits
    scores = [_score(values[first : first + size]) for first in range(0, size * splits, size)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(values: Float[np.ndarray, "image class"]) -> float:
    mean = values.mean(axis=0)
    ratio = np.log(np.where(values > 0, values, 1)) - np.log(np.where(mean > 0, mean, 1))  # 0 log 0 is 0
    return float(np.exp((values * ratio).sum(axis=1).mean()))
