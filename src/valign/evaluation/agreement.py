"""How far several detectors agree on the same images: Cohen's kappa (1960) per pair, with its table and an interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Shaped

from valign.detectors.any_of import AnyOf
from valign.evaluation.results import ImageResult
from valign.evaluation.statistics import LEVEL, Interval, share_interval
from valign.interfaces import EVERY_CATEGORY, DetectorCard
from valign.methods import Method

METHOD = Method(
    slug="kappa",
    title="Cohen's kappa: agreement of detectors beyond chance",
    paper="-",
    room="evaluation",
    entry="valign.evaluation.agreement:cohen_kappa",
    fidelity="exact",
    note="Cohen's formula, with an interval",
)


@dataclass(frozen=True)
class Agreement:
    """Two detectors on the ``images`` for which both have an answer, by the ``categories`` that both measure ("all": any).

    ``kappa`` is None where it is not defined: such images do not exist, or both say the same of every one of them.
    ``unscored`` counts images without an answer of one of them. ``disputed`` lists (system, prompt id), in order.
    """

    first: str
    second: str
    categories: tuple[str, ...]
    images: int = 0
    both: int = 0
    only_first: int = 0
    only_second: int = 0
    neither: int = 0
    unscored: int = 0
    kappa: Interval | None = None
    disputed: tuple[tuple[str, str], ...] = ()


def kappa_of(table: Float[np.ndarray, "*sample 4"]) -> Float[np.ndarray, "*sample"]:
    """``(p_o - p_e) / (1 - p_e)`` of counts (both, only first, only second, neither); NaN where ``p_e`` is 1."""
    both, first, second, neither = np.moveaxis(np.asarray(table, dtype=np.float64), -1, 0)
    total = both + first + second + neither
    observed = (both + neither) / total
    expected = ((both + first) * (both + second) + (neither + second) * (neither + first)) / total**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected < 1, (observed - expected) / (1 - expected), np.nan)


def cohen_kappa(
    first: Bool[np.ndarray, " image"],
    second: Bool[np.ndarray, " image"],
    clusters: Shaped[np.ndarray, " image"],
    *,
    samples: int = 2000,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval | None:
    """Agreement of two yes/no judgements beyond chance, 1 if they always agree; None if it is not defined.

    Percentile interval over resampled clusters (prompts). Where the two never disagree resampling sees no uncertainty: then
    Wilson's limits of the share of agreement stand in, at the expected agreement that was found.
    """
    parts = np.stack([first & second, first & ~second, ~first & second, ~first & ~second], axis=1).astype(np.float64)
    whole = parts.sum(axis=0)
    if not len(parts) or np.isnan(value := float(kappa_of(whole))):
        return None
    agreed = first == second
    if agreed.all():
        expected = float((first.mean() * second.mean()) + (1 - first.mean()) * (1 - second.mean()))
        low = (share_interval(agreed, clusters, level=level).low - expected) / (1 - expected)
        return Interval(value, max(-1.0, low), value)
    _, member = np.unique(clusters, return_inverse=True)
    tables = np.stack([np.bincount(member, weights=column) for column in parts.T], axis=1)
    alike, copies = np.unique(tables, axis=0, return_counts=True)  # equal prompts are drawn as one
    drawn = np.random.default_rng(seed).multinomial(len(tables), copies / len(tables), size=samples)
    found = kappa_of(drawn @ alike)
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, min(value, float(low)), max(value, float(high)))


def agreements(detector: AnyOf, rows: Sequence[ImageResult], *, seed: int = 0) -> list[Agreement]:
    """Every pair of the joined detectors on the rows of images that were looked at."""
    looked_at = [row for row in rows if row.scores]
    return [_pair(detector.card, *pair, looked_at, seed) for pair in combinations(detector.names, 2)]


def _pair(card: DetectorCard, first: str, second: str, rows: Sequence[ImageResult], seed: int) -> Agreement:
    sides = [{one: ids for one, ids in card.coverage.items() if one.partition(":")[0] == name} for name in (first, second)]
    common = _common(*({category for ids in side.values() for category in ids} for side in sides))
    found = Agreement(first, second, tuple(sorted(common)))
    if not common or not rows:
        return found
    answers = []
    for side in sides:
        classes = [one for one, ids in side.items() if EVERY_CATEGORY in (*ids, *common) or common & set(ids)]
        answers.append([_answer([row.scores.get(one, np.nan) for one in classes], card.threshold) for row in rows])
    known = [i for i in range(len(rows)) if None not in (answers[0][i], answers[1][i])]
    left, right = (np.array([bool(side[i]) for i in known], dtype=bool) for side in answers)
    disputed = tuple((rows[i].system, rows[i].id) for i, a, b in zip(known, left, right) if a != b)
    return Agreement(
        first,
        second,
        found.categories,
        images=len(known),
        both=int((left & right).sum()),
        only_first=int((left & ~right).sum()),
        only_second=int((~left & right).sum()),
        neither=int((~left & ~right).sum()),
        unscored=len(rows) - len(known),
        kappa=cohen_kappa(left, right, np.array([rows[i].cluster for i in known], dtype=str), seed=seed),
        disputed=disputed,
    )


def _common(first: set[str], second: set[str]) -> set[str]:
    """Categories that both measure."""
    if EVERY_CATEGORY in first:
        return second
    return first if EVERY_CATEGORY in second else first & second


def _answer(scores: Sequence[float], threshold: float) -> bool | None:
    """Harmful, harmless, or None where a score is missing and the others are below the threshold."""
    harmful = any(score >= threshold for score in scores)
    return None if not harmful and any(np.isnan(score) for score in scores) else harmful
