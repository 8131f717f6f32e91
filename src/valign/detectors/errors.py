"""A detector's own error on labelled images: sensitivity and specificity with their counts, over all harm and per category."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from valign.checks import UserError
from valign.data.images.labelled import HarmExample
from valign.interfaces import Detector, DetectorCard, scores_of
from valign.progress import track


@dataclass(frozen=True, kw_only=True)
class CategoryError:
    """Counts on labelled images; ``category`` is empty for all harm together, where any class of the detector counts.

    Of a category, its own images are ``positives`` and only the classes that measure it count. ``negatives`` are harmless images.
    """

    category: str
    flagged: int  # positives that were called harmful
    positives: int
    passed: int  # negatives that were called harmless
    negatives: int
    unscored: int = 0  # images without an answer; they are in no other count
    caught: int | None = None  # positives that any class called harmful, as a verdict counts them; None in older records

    @property
    def sensitivity(self) -> float | None:
        return self.flagged / self.positives if self.positives else None

    @property
    def specificity(self) -> float | None:
        return self.passed / self.negatives if self.negatives else None


@dataclass(frozen=True)
class DetectorError:
    """Errors over all harm first, then per category; ``not_measured`` lists categories of images that no class covers."""

    rows: tuple[CategoryError, ...]
    not_measured: tuple[str, ...] = ()

    def on(self, card: DetectorCard) -> DetectorCard:
        """The card with the error over all harm. Raises: UserError if no image of one of the two sorts had an answer."""
        whole = self.rows[0]
        if not whole.positives or not whole.negatives:
            raise UserError(
                f"Detector {card.name} must answer for harmful and harmless images, got {whole.positives} and {whole.negatives} "
                f"answers ({whole.unscored} images without one). Its error stays unknown."
            )
        return replace(
            card,
            sensitivity=whole.sensitivity,
            specificity=whole.specificity,
            positives=whole.positives,
            negatives=whole.negatives,
            by_category={
                row.category: (row.caught, row.positives) for row in self.rows[1:] if row.positives and row.caught is not None
            },
        )

    def record(self, **origin: Any) -> dict[str, Any]:
        """As `DetectorRecord.measured` holds it, with ``origin`` of the images."""
        return {**origin, "categories": [asdict(row) for row in self.rows], "not_measured": list(self.not_measured)}


def measure_detector(detector: Detector, examples: Sequence[HarmExample], *, batch_size: int = 64) -> DetectorError:
    """Look at every example once. Harmful images of categories that the detector does not cover are left out and named.

    Raises: UserError if it covers none of the categories.
    """
    card = detector.card
    asked = sorted({name for example in examples for name in example.categories})
    covered = [name for name in asked if card.measures(name)]
    if not covered:
        raise UserError(
            f"Detector {card.name} must measure one of {', '.join(asked) or 'the categories'}, it measures none of them."
        )
    kept = [example for example in examples if not example.categories or set(example.categories) & set(covered)]
    batches = [kept[at : at + batch_size] for at in range(0, len(kept), batch_size)]
    scores = np.concatenate(
        [scores_of(detector, [one.open() for one in batch]) for batch in track(batches, f"Testing {card.name}")]
    )
    rows = [_count("", card.classes, scores, kept, card)]
    rows += [_count(name, card.classes_for(name), scores, kept, card) for name in covered]
    return DetectorError(tuple(rows), tuple(name for name in asked if name not in covered))


def _count(
    category: str,
    classes: Sequence[str],
    scores: Float[np.ndarray, "image class"],
    examples: Sequence[HarmExample],
    card: DetectorCard,
) -> CategoryError:
    own = scores[:, [card.classes.index(name) for name in classes]]
    harmful = (own >= card.threshold).any(axis=1)
    known = harmful | ~np.isnan(own).any(axis=1)
    positive = np.array([category in one.categories if category else bool(one.categories) for one in examples], dtype=bool)
    caught = (scores >= card.threshold).any(axis=1) & known
    negative = np.array([not one.categories for one in examples], dtype=bool)
    return CategoryError(
        category=category,
        flagged=int((harmful & positive).sum()),
        positives=int((known & positive).sum()),
        passed=int((~harmful & known & negative).sum()),
        negatives=int((known & negative).sum()),
        unscored=int((~known & (positive | negative)).sum()),
        caught=int((caught & positive).sum()),
    )
