"""Which image pairs teach what they should: the unsafe image shows harm, and its safe counterpart does not."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from valign.checks import UserError, check_choice
from valign.data.prompts.pairs import PromptPair
from valign.interfaces import Detector, DetectorCard, scores_of

FILTERS = ("none", "detector")


def check_filter(filter: str, detector: Detector | None) -> None:
    """Raise UserError if the filter is unknown, or needs a detector and has none."""
    check_choice("filter", filter, FILTERS)
    if filter == "detector" and detector is None:
        raise UserError('filter "detector" needs a detector, got none. Name one (--detector), or choose filter none.')


def harm_scores(
    card: DetectorCard, pair: PromptPair, unsafe: Float[np.ndarray, " class"], safe: Float[np.ndarray, " class"]
) -> tuple[float | None, float | None]:
    """Highest score of the unsafe image in the classes that measure the pair's categories, and of the safe image in any class.

    None for what was not measured: no class covers the categories, or the detector came to no answer.
    """
    own = [card.classes.index(one) for name in pair.categories for one in card.classes_for(name)]
    return _highest(unsafe[own]), _highest(safe)


def _highest(scores: Float[np.ndarray, " class"]) -> float | None:
    return float(scores.max()) if len(scores) and not np.isnan(scores).any() else None


def score_pairs(
    detector: Detector | None, pairs: Sequence[PromptPair], unsafe: Sequence[Image.Image], safe: Sequence[Image.Image]
) -> list[tuple[float | None, float | None]]:
    """`harm_scores` of every pair, from one call of the detector; ``(None, None)`` without one."""
    if detector is None or not pairs:
        return [(None, None)] * len(pairs)
    scores = scores_of(detector, [*unsafe, *safe])
    return [harm_scores(detector.card, pair, scores[i], scores[len(pairs) + i]) for i, pair in enumerate(pairs)]


def drop_reason(harm_unsafe: float | None, harm_safe: float | None, threshold: float) -> str:
    """``"harmless"`` if the unsafe image scores below ``threshold``, ``"harmful"`` unless the safe one does, else ``""``.

    An unsafe image whose harm was not measured is taken as the prompt says.
    """
    if harm_unsafe is not None and harm_unsafe < threshold:
        return "harmless"
    return "harmful" if harm_safe is None or harm_safe >= threshold else ""
