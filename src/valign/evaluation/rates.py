"""The two numbers that a report is made of, each with its interval and its paired difference from the base: `Rate` and `Mean`."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped

from valign.evaluation.statistics import (
    Interval,
    McNemar,
    effective_size,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    rogan_gladen,
    share_difference,
    wilson,
)
from valign.interfaces import DetectorCard


@dataclass(frozen=True)
class PairedDifference:
    """System minus base over the same prompts and seeds; ``test`` is None where the outcome is not a yes or no."""

    difference: Interval
    test: McNemar | None = None


@dataclass(frozen=True)
class Rate:
    """``count`` of ``total`` images, interval by Wilson; ``corrected`` for the known error of the detector.

    ``left_out`` more images were not measured and count on neither side.
    """

    count: int
    total: int
    share: Interval
    corrected: Interval | None = None
    versus: PairedDifference | None = None
    left_out: int = 0


@dataclass(frozen=True)
class Mean:
    """Average over ``total`` images with a bootstrap interval over prompts."""

    total: int
    mean: Interval
    versus: PairedDifference | None = None


def rate_of(
    outcomes: Bool[np.ndarray, " item"],
    clusters: Shaped[np.ndarray, " item"],
    *,
    base: Bool[np.ndarray, " item"] | None = None,
    card: DetectorCard | None = None,
    seed: int = 0,
) -> Rate:
    """Share of true outcomes.

    Args:
        clusters: One label per outcome (the prompt); those of one label are not independent.
        base: The base model's outcomes in the same order.
        card: Of the detector that gave the outcomes; asks for the correction.
    """
    count, total = int(outcomes.sum()), len(outcomes)
    size = effective_size(outcomes, clusters)
    versus = None if base is None else paired_change(base, outcomes, clusters, seed=seed)
    return Rate(count, total, wilson(count, total, size=size), corrected_rate(count, total, card, size=size), versus)


def paired_change(
    before: Bool[np.ndarray, " item"], after: Bool[np.ndarray, " item"], clusters: Shaped[np.ndarray, " item"], *, seed: int = 0
) -> PairedDifference:
    """After minus before, with its interval and its paired test."""
    return PairedDifference(share_difference(before, after, clusters, seed=seed), mcnemar(before, after, clusters))


def corrected_rate(count: int, total: int, card: DetectorCard | None, *, size: float | None = None) -> Interval | None:
    """The rate behind what the detector saw; None where its error is unknown or the detector is no better than chance.

    Args: size: Effective number of independent images; None for ``total``.
    """
    if card is None or card.sensitivity is None or card.specificity is None or not card.better_than_chance():
        return None
    return rogan_gladen(
        count, total, card.sensitivity, card.specificity, positives=card.positives, negatives=card.negatives, size=size
    )


def mean_of(
    values: Float[np.ndarray, " item"],
    clusters: Shaped[np.ndarray, " item"],
    *,
    base: Float[np.ndarray, " item"] | None = None,
    seed: int = 0,
) -> Mean:
    """Mean of finite values, paired with the base's where given."""
    versus = None if base is None else PairedDifference(paired_bootstrap(base, values, clusters, seed=seed))
    return Mean(len(values), mean_interval(values, clusters, seed=seed), versus)
