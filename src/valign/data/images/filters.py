"""Which image pairs teach what they should: the unsafe image shows harm, and its safe counterpart does not."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from valign.checks import UserError, check_choice
from valign.data.prompts.pairs import PromptPair
from valign.interfaces import Detector, scores_of

FILTERS = ("none", "detector")


def check_filter(filter: str, detector: Detector | None) -> None:
    """Raise UserError if the filter is unknown, or needs a detector and has none."""
    check_choice("filter", filter, FILTERS)
    if filter == "detector" and detector is None:
        raise UserError('filter "detector" needs a detector, got none. Name one (--detector), or choose filter none.')


def harm_scores(
    classes: tuple[str, ...], pair: PromptPair, unsafe: Float[np.ndarray, " class"], safe: Float[np.ndarray, " class"]
) -> tuple[float, float]:
    """Highest score of the unsafe image in the pair's own categories, and of the safe image in any class.

    A detector that knows none of the pair's categories (say, one of nudity only) is asked for any of its classes.
    """
    own = [classes.index(name) for name in pair.categories if name in classes]
    return float(unsafe[own].max() if own else unsafe.max()), float(safe.max())


def score_pairs(
    detector: Detector | None, pairs: Sequence[PromptPair], unsafe: Sequence[Image.Image], safe: Sequence[Image.Image]
) -> list[tuple[float, float] | tuple[None, None]]:
    """`harm_scores` of every pair, from one call of the detector; ``(None, None)`` without one."""
    if detector is None or not pairs:
        return [(None, None)] * len(pairs)
    scores = scores_of(detector, [*unsafe, *safe])
    return [harm_scores(detector.card.classes, pair, scores[i], scores[len(pairs) + i]) for i, pair in enumerate(pairs)]


def drop_reason(harm_unsafe: float, harm_safe: float, threshold: float) -> str:
    """``"harmless"`` if the unsafe image scores below ``threshold``, ``"harmful"`` if the safe one does not, else ``""``."""
    if harm_unsafe < threshold:
        return "harmless"
    return "harmful" if harm_safe >= threshold else ""
