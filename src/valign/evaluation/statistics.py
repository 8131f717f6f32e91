"""Rates with intervals, paired tests, and rates corrected for the detector's own error. Pure NumPy and SciPy, float64."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from jaxtyping import Float, Shaped
from scipy.stats import binom, norm
from scipy.stats import t as student

from valign.checks import check_range

LEVEL = 0.95  # of every interval in a report
EXACT_PAIRS = 14  # up to here `sign_flip_test` tries every pattern of signs


@dataclass(frozen=True)
class Interval:
    """An estimate between its limits, at the level that was asked for."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class McNemar:
    """``lost`` pairs were true before and false after, ``gained`` the other way round. p-values are two-sided."""

    lost: int
    gained: int
    exact: float
    mid_p: float


def wilson(count: int, total: int, *, level: float = LEVEL) -> Interval:
    """Score interval of a share (Wilson 1927): never outside [0, 1], and honest at 0 and at ``total``."""
    _check_count("wilson", count, total)
    z = _z(level)
    share, weight = count / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / weight
    half = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / weight
    low = 0.0 if count == 0 else centre - half
    high = 1.0 if count == total else centre + half
    return Interval(share, low, high)


def mcnemar(before: Shaped[np.ndarray, " pair"], after: Shaped[np.ndarray, " twin"]) -> McNemar:
    """Did a yes/no outcome change over the same prompts and seeds? Exact binomial test on the pairs that changed, and its mid-p
    form (Fagerland et al. 2013), which is less conservative. Without any change both are 1."""
    before, after = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    _check_pairs("mcnemar", len(before), len(after))
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    changed, fewer = lost + gained, min(lost, gained)
    if changed == 0:
        return McNemar(lost, gained, 1.0, 1.0)
    tail, point = binom.cdf(fewer, changed, 0.5), binom.pmf(fewer, changed, 0.5)
    return McNemar(lost, gained, min(1.0, float(2 * tail)), min(1.0, float(2 * tail - point)))


def paired_bootstrap(
    before: Float[np.ndarray, " pair"],
    after: Float[np.ndarray, " pair"],
    clusters: Shaped[np.ndarray, " pair"],
    *,
    samples: int = 2000,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Mean of ``after - before`` with a percentile interval; whole prompts are redrawn, so the seeds of one prompt stay together.

    Args:
        clusters: One label per pair (the prompt); pairs with equal labels are drawn together.
        samples: Bootstrap samples, >= 100.
    """
    _check_pairs("paired_bootstrap", len(before), len(after), len(clusters))
    check_range("paired_bootstrap.samples", float(samples), low=100.0)
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    _, member = np.unique(clusters, return_inverse=True)
    prompts = np.stack([np.bincount(member, weights=difference), np.bincount(member)], axis=1)
    alike, copies = np.unique(prompts, axis=0, return_counts=True)  # equal prompts are drawn as one: exact, and quick for shares
    generator, means, chunk = np.random.default_rng(seed), [], max(1, 2_000_000 // len(alike))
    for start in range(0, samples, chunk):  # bounded memory: at most 2 million draws at once
        drawn = generator.multinomial(len(prompts), copies / len(prompts), size=min(chunk, samples - start))
        sums, sizes = (drawn @ alike).T
        means.append(sums / sizes)
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference.mean()), float(low), float(high))


def newcombe(before: Shaped[np.ndarray, " pair"], after: Shaped[np.ndarray, " pair"], *, level: float = LEVEL) -> Interval:
    """Difference of two paired shares, after minus before, from Wilson limits and their correlation (Newcombe 1998, method 10)."""
    before, after = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    _check_pairs("newcombe", len(before), len(after))
    total = len(before)
    first, second = (wilson(int(side.sum()), total, level=level) for side in (before, after))
    both, neither = int((before & after).sum()), int((~before & ~after).sum())
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    margins = float((both + lost) * (gained + neither) * (both + gained) * (lost + neither))
    product = both * neither - lost * gained
    shrunk = max(product - total / 2, 0.0) if product > 0 else float(product)  # continuity correction
    correlation = shrunk / sqrt(margins) if margins else 0.0

    def reach(left: float, right: float) -> float:
        return sqrt(max(0.0, left * left - 2 * correlation * left * right + right * right))

    difference = second.value - first.value
    low = difference - reach(second.value - second.low, first.high - first.value)
    high = difference + reach(second.high - second.value, first.value - first.low)
    return Interval(difference, max(-1.0, low), min(1.0, high))


def share_difference(
    before: Shaped[np.ndarray, " pair"], after: Shaped[np.ndarray, " pair"], clusters: Shaped[np.ndarray, " pair"], *, seed: int = 0
) -> Interval:
    """Paired bootstrap of two shares; `newcombe` where all pairs changed alike, for then a bootstrap sees no uncertainty at all."""
    if len(set(np.asarray(after, dtype=int) - np.asarray(before, dtype=int))) == 1:
        return newcombe(before, after)
    return paired_bootstrap(np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64), clusters, seed=seed)


def mean_interval(
    values: Float[np.ndarray, " item"], clusters: Shaped[np.ndarray, " item"], *, samples: int = 2000, seed: int = 0
) -> Interval:
    """Mean with a bootstrap interval over prompts."""
    return paired_bootstrap(np.zeros(len(values)), values, clusters, samples=samples, seed=seed)


def t_interval(values: Float[np.ndarray, " value"], *, level: float = LEVEL) -> Interval:
    """Mean with Student's interval; of one value, or of equal ones, the limits are the mean itself."""
    check_range("t_interval.values", float(len(values)), low=1.0, hint="There is nothing to average.")
    check_range("level", level, above=0.0, high=1 - 1e-12)
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, mean, mean)
    half = float(student.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def sign_flip_test(differences: Float[np.ndarray, " pair"], *, samples: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value of paired differences: how often is the mean as far from 0 when every sign is a coin's?

    Exact for up to 14 pairs, so never below ``2 ** (1 - pairs)``; beyond that from ``samples`` draws (Phipson and Smyth 2010, never
    0). No difference at all gives 1.
    """
    check_range("sign_flip_test.differences", float(len(differences)), low=1.0, hint="There is nothing to compare.")
    values = np.asarray(differences, dtype=np.float64)
    if len(values) <= EXACT_PAIRS:
        signs = 1 - 2.0 * ((np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(samples, len(values)))
    limit = abs(values.sum()) * (1 - 1e-12)
    reached = int((np.abs(signs @ values) >= limit).sum())
    return reached / len(signs) if len(values) <= EXACT_PAIRS else (reached + 1) / (len(signs) + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = worst
    return adjusted


def rogan_gladen(
    count: int,
    total: int,
    sensitivity: float,
    specificity: float,
    *,
    positives: int | None = None,
    negatives: int | None = None,
    level: float = LEVEL,
) -> Interval:
    """The true share behind a flagged share: ``(p + specificity - 1) / (sensitivity + specificity - 1)``, cut to [0, 1].

    Source: Rogan and Gladen 1978. Interval: Wilson's limits through the same map when the detector's error is taken as
    known; when ``positives`` and ``negatives`` say on how many images it was measured, Lang and Reiczigel 2014, which
    adds that uncertainty.
    Raises: ValueError unless ``sensitivity + specificity > 1``; a detector no better than chance corrects nothing.
    """
    _check_count("rogan_gladen", count, total)
    youden = sensitivity + specificity - 1
    check_range("rogan_gladen.sensitivity", sensitivity, low=0.0, high=1.0)
    check_range("rogan_gladen.specificity", specificity, low=0.0, high=1.0)
    check_range("sensitivity + specificity - 1", youden, above=0.0, hint="The detector is no better than chance.")
    value = (count / total + specificity - 1) / youden
    if positives and negatives:
        low, high = _lang_reiczigel(count, total, sensitivity, specificity, positives, negatives, _z(level))
    else:
        seen = wilson(count, total, level=level)
        low, high = ((limit + specificity - 1) / youden for limit in (seen.low, seen.high))
    value, low, high = (min(1.0, max(0.0, number)) for number in (value, low, high))
    return Interval(value, min(low, value), max(high, value))


def _lang_reiczigel(
    count: int, total: int, sensitivity: float, specificity: float, positives: int, negatives: int, z: float
) -> tuple[float, float]:
    """Limits around an estimate shrunk towards one half, with a shift for its skewness (their equations 11 to 16)."""
    n, n_se, n_sp = total + z * z, positives + 2, negatives + 2
    seen = (count + z * z / 2) / n
    se, sp = (positives * sensitivity + 1) / n_se, (negatives * specificity + 1) / n_sp
    youden = se + sp - 1
    share = (seen + sp - 1) / youden
    from_se, from_sp = se * (1 - se) / n_se, sp * (1 - sp) / n_sp
    shift = 2 * z * z * (share * from_se - (1 - share) * from_sp)
    spread = sqrt(seen * (1 - seen) / n + share**2 * from_se + (1 - share) ** 2 * from_sp) / youden
    return share + shift - z * spread, share + shift + z * spread


def _z(level: float) -> float:
    check_range("level", level, above=0.0, high=1 - 1e-12)
    return float(norm.ppf((1 + level) / 2))


def _check_count(name: str, count: int, total: int) -> None:
    check_range(f"{name}.total", float(total), low=1.0, hint="There is nothing to count.")
    check_range(f"{name}.count", float(count), low=0.0, high=float(total))


def _check_pairs(name: str, *lengths: int) -> None:
    if len(set(lengths)) != 1 or lengths[0] == 0:
        raise ValueError(f"{name} must get equally many values on every side and at least one, got {', '.join(map(str, lengths))}.")
