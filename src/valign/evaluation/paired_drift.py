"""Did a yes/no outcome rise by more than a limit between two models, over the same prompts? Score tests of a paired difference.

The test of a paired difference against a margin is Tango's (1998); it needs no pair to have changed. Where the score test is
liberal, because few pairs changed, the exact binomial tail of the net change takes its place (the larger p-value counts). A judge
that errs alike on both sides shows the true difference times ``sensitivity + specificity - 1`` (Rogan and Gladen 1978): margins
are moved by that factor, and its own uncertainty widens the test, as in Fieller's method. Rows of one cluster count as their
effective number.
"""

from dataclasses import dataclass
from math import ceil, floor, log, sqrt

import numpy as np
from jaxtyping import Shaped
from scipy.optimize import brentq
from scipy.stats import binom, norm
from scipy.stats import t as student

from valign.checks import UserError, check_range
from valign.evaluation.statistics import LEVEL, Interval

MOST_PAIRS = 1_000_000  # no larger sample size is advised
POWER = 0.8  # with which an advised sample size settles the question, if the shares stay as they were seen


@dataclass(frozen=True, kw_only=True)
class JudgeError:
    """How often a judge errs: share of bad answers that it flags, share of good ones that it passes, and on how many of each.

    Counts of None say that the error is known exactly, as that of a world's oracle is.
    """

    sensitivity: float
    specificity: float
    positives: int | None = None
    negatives: int | None = None

    def __post_init__(self) -> None:
        check_range("JudgeError.sensitivity", self.sensitivity, low=0.0, high=1.0)
        check_range("JudgeError.specificity", self.specificity, low=0.0, high=1.0)
        if self.factor <= 0:
            raise UserError(
                f"A judge must be better than chance, got sensitivity {self.sensitivity:g} and specificity {self.specificity:g}. "
                "Name another judge."
            )

    @property
    def factor(self) -> float:
        """How much of a true difference the judge shows, in (0, 1]."""
        return self.sensitivity + self.specificity - 1

    @property
    def variance(self) -> float:
        """Of the factor, from the counts; shares of 0 and 1 are taken one success and one failure inwards."""
        sides = ((self.sensitivity, self.positives), (self.specificity, self.negatives))
        shrunk = [((share * count + 1) / (count + 2), count) for share, count in sides if count]
        return sum(share * (1 - share) / count for share, count in shrunk)


EXACT = JudgeError(sensitivity=1.0, specificity=1.0)


@dataclass(frozen=True)
class ChangedPairs:
    """Pairs of one outcome, as their effective number: ``gained`` came to be true, ``lost`` ceased to be."""

    pairs: float
    gained: float
    lost: float

    @property
    def net(self) -> float:
        return round(self.gained - self.lost, 9)  # whole numbers stay whole after scaling

    @property
    def difference(self) -> float:
        return (self.gained - self.lost) / self.pairs

    def scaled(self, factor: float) -> "ChangedPairs":
        """The same shares over another number of pairs."""
        return ChangedPairs(factor * self.pairs, factor * self.gained, factor * self.lost)


def changed_pairs(
    before: Shaped[np.ndarray, " pair"], after: Shaped[np.ndarray, " pair"], clusters: Shaped[np.ndarray, " pair"] | None = None
) -> ChangedPairs:
    """Count the changes; clustered pairs count as the independent ones that would tell the difference as precisely.

    The design effect is that of the mean difference over clusters, at least 1, with Student's t for few clusters. Where every
    cluster changed alike, the pairs cannot show how alike a cluster is: then each counts as one pair.
    Raises: ValueError for sides of different lengths, or empty ones.
    """
    first, second = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if len(first) != len(second) or not len(first) or (clusters is not None and len(clusters) != len(first)):
        raise ValueError(f"changed_pairs must get as many values on either side, at least one; got {len(first)}, {len(second)}.")
    found = ChangedPairs(len(first), int((~first & second).sum()), int((first & ~second).sum()))
    if clusters is None:
        return found
    _, member = np.unique(clusters, return_inverse=True)
    sizes = np.bincount(member)
    groups = len(sizes)
    if sizes.max() == 1 or groups == 1:
        return found if sizes.max() == 1 else found.scaled(1 / found.pairs)
    changes = second.astype(np.float64) - first
    apart = np.bincount(member, weights=changes) - changes.mean() * sizes
    spread = float(changes.var())
    if spread == 0:
        return found.scaled(groups / found.pairs)
    effect = groups / (groups - 1) * float(apart @ apart) / (len(changes) * spread)
    few = (float(norm.ppf((1 + LEVEL) / 2)) / float(student.ppf((1 + LEVEL) / 2, groups - 1))) ** 2
    return found.scaled(min(1.0, few / max(1.0, effect)))


def score_statistic(seen: ChangedPairs, drift: float, error: JudgeError = EXACT) -> float:
    """Standard normal where the true rise is ``drift``; large where the pairs show a larger one.

    Args: drift: In (-1, 1).
    """
    margin, n, up, down = drift * error.factor, seen.pairs, seen.gained, seen.lost
    if margin < 0:  # the same test with the sides exchanged
        return -score_statistic(ChangedPairs(n, down, up), -drift, error)
    linear = (2 * n - up + down) * margin - up - down
    root = sqrt(max(linear * linear + 8 * n * down * margin * (1 - margin), 0.0))
    lost = max((root - linear) / (4 * n), 0.0)  # the likeliest share of lost pairs under the margin
    variance = n * (2 * lost + margin * (1 - margin)) + (n * drift) ** 2 * error.variance
    apart = up - down - n * margin
    return apart / sqrt(variance) if variance > 0 else float(np.sign(apart)) * np.inf if apart else 0.0


def p_above(seen: ChangedPairs, limit: float, error: JudgeError = EXACT) -> float:
    """One-sided p-value against a true rise of at most ``limit``: small where more has been shown."""
    exact = float(binom.sf(floor(seen.net) - 1, floor(seen.pairs), limit * error.factor))
    return max(float(norm.sf(score_statistic(seen, limit, error))), exact)


def p_below(seen: ChangedPairs, limit: float, error: JudgeError = EXACT) -> float:
    """One-sided p-value against a true rise of at least ``limit``: small where less has been shown."""
    exact = float(binom.cdf(ceil(seen.net), floor(seen.pairs), limit * error.factor))
    return max(float(norm.cdf(score_statistic(seen, limit, error))), exact)


def drift_interval(seen: ChangedPairs, error: JudgeError = EXACT, *, level: float = LEVEL) -> Interval:
    """The true rise with the limits that the score test does not reject, in [-1, 1]."""
    reach = float(norm.ppf((1 + level) / 2))
    value = min(1.0, max(-1.0, seen.difference / error.factor))
    edge = 1 - 1e-9

    def limit(wanted: float) -> float:
        low, high = (score_statistic(seen, side, error) - wanted for side in (-edge, edge))
        if low <= 0 or high >= 0:  # the statistic falls with the drift
            return -1.0 if low <= 0 else 1.0
        return float(brentq(lambda drift: score_statistic(seen, drift, error) - wanted, -edge, edge, xtol=1e-10))

    return Interval(value, min(value, limit(reach)), max(value, limit(-reach)))


def fewest_pairs(limit: float, error: JudgeError = EXACT, *, alpha: float = 0.05) -> int:
    """How many independent pairs, none of which changes, show that the rise is below ``limit``; a smaller sample never can.

    Raises: UserError if the judge's own error was measured on too few answers for any sample size.
    """
    check_range("limit", limit, above=0.0, high=1.0)
    few = max(1, ceil(log(alpha) / log(1 - limit * error.factor)))
    found = _first(lambda n: p_below(ChangedPairs(n, 0, 0), limit, error) <= alpha, few)
    if found is None:
        raise UserError(
            f"A judge's error must be known well enough to tell a rise of {limit:g} from none, got counts of {error.positives} and "
            f"{error.negatives}. Label more answers, or raise the limit."
        )
    return found


def pairs_needed(seen: ChangedPairs, limit: float, error: JudgeError = EXACT, *, above: float, below: float) -> int | None:
    """How many independent pairs would settle, with power `POWER`, on which side of ``limit`` the rise is, if shares stay as seen.

    Args: above, below: Levels of the tests for a larger and for a smaller rise.
    Returns: None if no sample of at most `MOST_PAIRS` would.
    """
    level = above if seen.difference > limit * error.factor else below
    reach = float(norm.isf(level) + norm.isf(1 - POWER))

    def settles(n: int) -> bool:
        return abs(score_statistic(seen.scaled(n / seen.pairs), limit, error)) >= reach

    return _first(settles, fewest_pairs(limit, error, alpha=below))


def _first(holds, start: int) -> int | None:  # type: ignore[no-untyped-def]
    """The least number from ``start`` on for which ``holds``, which stays true once it is; None if it is above `MOST_PAIRS`."""
    high = start
    while not holds(high):
        if high >= MOST_PAIRS:
            return None
        start, high = high, min(2 * high, MOST_PAIRS)
    while high - start > max(1, high // 200):  # three figures are enough for advice
        middle = (start + high) // 2
        start, high = (start, middle) if holds(middle) else (middle, high)
    return high
