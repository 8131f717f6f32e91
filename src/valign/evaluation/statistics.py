"""Rates with intervals, paired tests, and rates corrected for the detector's own error. Pure NumPy and SciPy, float64.

Rows of one cluster (the seeds of one prompt) are not independent. Where ``clusters`` labels the rows and some label occurs more
than once, intervals use the effective number of rows and tests permute whole clusters; otherwise the textbook formulas apply.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from jaxtyping import Float, Int, Shaped
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
    """``lost`` pairs were true before and false after, ``gained`` the other way round. Two-sided p-values: exact and mid-p."""

    lost: int
    gained: int
    exact: float
    mid_p: float


def wilson(count: int, total: int, *, size: float | None = None, level: float = LEVEL) -> Interval:
    """Score interval of a share (Wilson 1927): never outside [0, 1], and honest at 0 and at ``total``.

    Args: size: Effective number of independent rows (see `effective_size`); None for ``total``.
    """
    _check_count("wilson", count, total)
    z, n = _z(level), total if size is None else size
    share, weight = count / total, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / weight
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / weight
    low = 0.0 if count == 0 else centre - half
    high = 1.0 if count == total else centre + half
    return Interval(share, low, high)


def effective_size(
    outcomes: Shaped[np.ndarray, " row"], clusters: Shaped[np.ndarray, " row"] | None, *, level: float = LEVEL
) -> float | None:
    """Number of independent rows that would tell the share of true outcomes as precisely as these clustered ones, in [1, rows].

    ``rows / deff``, where the design effect ``deff >= 1`` is the variance of the share over clusters, as of a ratio, divided by
    ``p (1 - p) / rows`` (Rao and Scott 1992); times ``(z / t)^2`` for few clusters (Korn and Graubard 1998), t with clusters - 1
    degrees of freedom. Where all outcomes are equal the rows cannot show how alike a cluster is: then the number of clusters.
    Returns: None without clusters, or where each cluster has one row: the rows are independent.
    """
    if clusters is None:
        return None
    values = np.asarray(outcomes, dtype=np.float64)
    _check_pairs("effective_size", len(values), len(clusters))
    _, member = np.unique(clusters, return_inverse=True)
    sizes = np.bincount(member)
    if sizes.max() == 1:
        return None
    share, groups = float(values.mean()), len(sizes)
    if share in (0.0, 1.0) or groups == 1:
        return float(groups)
    apart = np.bincount(member, weights=values) - share * sizes
    effect = groups / (groups - 1) * float(apart @ apart) / (len(values) * share * (1 - share))
    few = (_z(level) / float(student.ppf((1 + level) / 2, groups - 1))) ** 2
    return max(1.0, few * len(values) / max(1.0, effect))


def share_interval(
    outcomes: Shaped[np.ndarray, " row"], clusters: Shaped[np.ndarray, " row"] | None = None, *, level: float = LEVEL
) -> Interval:
    """`wilson` of the share of true outcomes, with the `effective_size` of clustered rows (as Dean and Pagano 2015 compare)."""
    size = effective_size(outcomes, clusters, level=level)
    return wilson(int(np.asarray(outcomes, dtype=bool).sum()), len(outcomes), size=size, level=level)


def mcnemar(
    before: Shaped[np.ndarray, " pair"],
    after: Shaped[np.ndarray, " pair_after"],
    clusters: Shaped[np.ndarray, " pair"] | None = None,
) -> McNemar:
    """Did a yes/no outcome change over the same prompts and seeds?

    Exact binomial test on the pairs that changed, and its mid-p form (Fagerland et al. 2013), which is less conservative. Where a
    cluster has several pairs, the exact permutation test that flips whole clusters: the sum of ``after - before`` against all
    signs of the clusters' sums. With one pair per cluster it is the binomial test. Without any change both p-values are 1.
    """
    before, after = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    _check_pairs("mcnemar", len(before), len(after), *([] if clusters is None else [len(clusters)]))
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    changed, fewer = lost + gained, min(lost, gained)
    if changed == 0:
        return McNemar(lost, gained, 1.0, 1.0)
    labels = np.arange(len(before)) if clusters is None else clusters
    _, member = np.unique(labels, return_inverse=True)
    if np.bincount(member).max() == 1:
        tail, point = binom.cdf(fewer, changed, 0.5), binom.pmf(fewer, changed, 0.5)
    else:
        tail, point = _cluster_tail(np.bincount(member, weights=after.astype(float) - before).astype(int))
    return McNemar(lost, gained, min(1.0, float(2 * tail)), min(1.0, float(2 * tail - point)))


def _cluster_tail(sums: Int[np.ndarray, " cluster"]) -> tuple[float, float]:
    """Chance that the sum, with a fair coin as the sign of each cluster, is at most ``-abs(sum)``, and exactly that."""
    chances = np.ones(1)  # of the sum of the clusters with a plus, from 0 on
    for size in np.abs(sums[sums != 0]):
        chances = (np.pad(chances, (0, size)) + np.pad(chances, (size, 0))) / 2
    fewer = (len(chances) - 1 - abs(int(sums.sum()))) // 2
    least = np.finfo(np.float64).tiny  # a p-value is never 0
    return max(float(chances[: fewer + 1].sum()), least), float(chances[fewer])


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


def newcombe(
    before: Shaped[np.ndarray, " pair"],
    after: Shaped[np.ndarray, " pair"],
    clusters: Shaped[np.ndarray, " pair"] | None = None,
    *,
    level: float = LEVEL,
) -> Interval:
    """Difference of two paired shares, after minus before, from Wilson limits and their correlation (Newcombe 1998, method 10).

    With clusters, the limits of `share_interval`, and the continuity correction of the smaller effective size.
    """
    before, after = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    _check_pairs("newcombe", len(before), len(after))
    first, second = (share_interval(side, clusters, level=level) for side in (before, after))
    sizes = [effective_size(side, clusters, level=level) or len(side) for side in (before, after)]
    total = len(before) ** 2 / min(sizes)  # the number of pairs, where they are independent
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
    """Paired bootstrap of two shares; `newcombe` where all clusters changed alike, for a bootstrap sees no uncertainty there."""
    _, member = np.unique(clusters, return_inverse=True)
    changes = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    if len(set(np.bincount(member, weights=changes) / np.bincount(member))) == 1:
        return newcombe(before, after, clusters)
    return paired_bootstrap(np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64), clusters, seed=seed)


def mean_interval(
    values: Float[np.ndarray, " item"], clusters: Shaped[np.ndarray, " item"], *, samples: int = 2000, seed: int = 0
) -> Interval:
    """Mean with a bootstrap interval over prompts."""
    return paired_bootstrap(np.zeros(len(values)), values, clusters, samples=samples, seed=seed)


def t_interval(values: Float[np.ndarray, " value"], *, level: float = LEVEL) -> Interval:
    """Mean with Student's interval; of equal values, the limits are the mean itself. One value has no interval and is refused."""
    check_range("t_interval.values", float(len(values)), low=2.0, hint="One value says nothing of how far others would spread.")
    check_range("level", level, above=0.0, high=1 - 1e-12)
    mean = float(np.mean(values))
    half = float(student.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def share_over_runs(counts: Sequence[int], total: int, *, level: float = LEVEL) -> Interval:
    """Share of true outcomes where every run (a training by another seed) answers the same ``total`` requests.

    The interval is for other runs and other requests. Each limit is ``sqrt(w^2 + t^2)`` away from the share: w to the `wilson`
    limit over requests, as if all runs answered alike, which overstates it where they do not, and t to that of `t_interval` over
    runs. One run has the former alone.
    """
    share = wilson(sum(counts), len(counts) * total, size=total, level=level)
    if len(counts) == 1:
        return share
    runs = t_interval(np.asarray(counts) / total, level=level)
    half = runs.high - runs.value
    below, above = (sqrt(part * part + half * half) for part in (share.value - share.low, share.high - share.value))
    return Interval(share.value, max(0.0, share.value - below), min(1.0, share.value + above))


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
    size: float | None = None,
    level: float = LEVEL,
) -> Interval:
    """The true share behind a flagged share: ``(p + specificity - 1) / (sensitivity + specificity - 1)``, cut to [0, 1].

    Source: Rogan and Gladen 1978. Interval: Wilson's limits through the same map when the detector's error is taken as
    known; when ``positives`` and ``negatives`` say on how many images it was measured, Lang and Reiczigel 2014, which
    adds that uncertainty; measured on very few, the limits are moved out to hold the value. ``size``: effective number of
    independent rows; None for ``total``.
    Raises: ValueError unless ``sensitivity + specificity > 1``; a detector no better than chance corrects nothing.
    """
    _check_count("rogan_gladen", count, total)
    youden = sensitivity + specificity - 1
    check_range("rogan_gladen.sensitivity", sensitivity, low=0.0, high=1.0)
    check_range("rogan_gladen.specificity", specificity, low=0.0, high=1.0)
    check_range("sensitivity + specificity - 1", youden, above=0.0, hint="The detector is no better than chance.")
    value = (count / total + specificity - 1) / youden
    if positives and negatives:
        hits, rows = (count, total) if size is None else (count / total * size, size)
        low, high = _lang_reiczigel(hits, rows, sensitivity, specificity, positives, negatives, _z(level))
        low, high = min(low, value), max(high, value)  # their centre is shrunk towards one half
    else:
        seen = wilson(count, total, size=size, level=level)
        low, high = ((limit + specificity - 1) / youden for limit in (seen.low, seen.high))
    return Interval(*(min(1.0, max(0.0, number)) for number in (value, low, high)))


def _lang_reiczigel(
    count: float, total: float, sensitivity: float, specificity: float, positives: int, negatives: int, z: float
) -> tuple[float, float]:
    """Limits around an estimate shrunk towards one half, with a shift for its skewness (their equations 11 to 16)."""
    n, n_se, n_sp = total + z * z, positives + 2, negatives + 2
    seen = (count + z * z / 2) / n
    se, sp = (positives * sensitivity + 1) / n_se, (negatives * specificity + 1) / n_sp
    youden = se + sp - 1
    if youden <= 0:  # measured on so few images that it may be no better than chance: any share is possible
        return 0.0, 1.0
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
