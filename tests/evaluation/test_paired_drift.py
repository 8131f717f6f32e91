"""Score tests of a paired difference against a limit, and what a judge's error does to them."""

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binom, norm

from valign.checks import UserError
from valign.evaluation.paired_drift import (
    ChangedPairs,
    JudgeError,
    changed_pairs,
    drift_interval,
    fewest_pairs,
    p_above,
    p_below,
    pairs_needed,
    score_statistic,
)

counts = st.integers(0, 30)


def numeric_statistic(pairs, gained, lost, margin):
    """Tango's statistic with the likelihood maximized numerically, not by its closed form."""

    def minus_log_likelihood(share):
        cells = ((gained, share + margin), (lost, share), (pairs - gained - lost, 1 - 2 * share - margin))
        return -sum(count * np.log(max(chance, 1e-300)) for count, chance in cells if count)

    share = minimize_scalar(minus_log_likelihood, bounds=(0, (1 - margin) / 2), method="bounded", options={"xatol": 1e-12}).x
    return (gained - lost - pairs * margin) / sqrt(pairs * (2 * share + margin * (1 - margin)))


@settings(max_examples=25)
@given(counts, counts, st.floats(0.01, 0.3))
def test_the_closed_form_is_the_likeliest_share_under_the_limit(gained, lost, margin):
    found = score_statistic(ChangedPairs(200, gained, lost), margin)
    assert found == pytest.approx(numeric_statistic(200, gained, lost, margin), abs=2e-3)


@settings(max_examples=25)
@given(counts, counts, st.floats(-0.3, 0.3))
def test_exchanging_the_sides_turns_the_sign(gained, lost, margin):
    one, other = ChangedPairs(200, gained, lost), ChangedPairs(200, lost, gained)
    assert score_statistic(one, margin) == pytest.approx(-score_statistic(other, -margin), abs=1e-9)


def test_at_no_drift_the_test_is_mcnemars():
    assert score_statistic(ChangedPairs(500, 15, 6), 0.0) == pytest.approx((15 - 6) / sqrt(15 + 6))


@settings(max_examples=25)
@given(counts, counts)
def test_the_interval_holds_what_the_test_does_not_reject(gained, lost):
    seen = ChangedPairs(200, gained, lost)
    found = drift_interval(seen)
    z = norm.ppf(0.975)
    assert found.low <= found.value <= found.high
    assert score_statistic(seen, found.low) == pytest.approx(z, abs=1e-4)
    assert score_statistic(seen, found.high) == pytest.approx(-z, abs=1e-4)


def test_without_a_change_the_exact_binomial_counts():
    assert p_below(ChangedPairs(149, 0, 0), 0.02) == pytest.approx(0.98**149)
    assert fewest_pairs(0.02) == 149  # the least n with 0.98^n <= 0.05
    assert fewest_pairs(0.05) == 59


@settings(max_examples=25)
@given(counts)
def test_the_larger_of_score_test_and_binomial_counts(gained):
    seen, score = ChangedPairs(100, gained, 0), numeric_statistic(100, gained, 0, 0.02)
    assert p_above(seen, 0.02) == pytest.approx(max(norm.sf(score), binom.sf(gained - 1, 100, 0.02)), abs=2e-3)
    assert p_below(seen, 0.02) == pytest.approx(max(norm.cdf(score), binom.cdf(gained, 100, 0.02)), abs=2e-3)


def test_levels_hold_at_the_limit():
    """At a true rise of exactly the limit either error stays below 5 % (2,000 draws, 3 standard errors)."""
    draws = np.random.default_rng(0).multinomial(600, [0.025, 0.005, 0.97], size=2000)
    seen, copies = np.unique(draws[:, :2], axis=0, return_counts=True)
    pairs = [ChangedPairs(600, up, down) for up, down in seen.tolist()]
    above, below = (copies @ [test(one, 0.02) <= 0.05 for one in pairs] / 2000 for test in (p_above, p_below))
    assert above <= 0.05 + 3 * sqrt(0.05 * 0.95 / 2000)
    assert below <= 0.05 + 3 * sqrt(0.05 * 0.95 / 2000)
    assert above > 0.02  # not by never rejecting
    assert below > 0.02


def test_an_erring_judge_moves_the_limit_and_widens_the_test():
    seen = ChangedPairs(900, 40, 10)
    exact, known = JudgeError(sensitivity=1, specificity=1), JudgeError(sensitivity=0.9, specificity=0.9)
    measured = JudgeError(sensitivity=0.9, specificity=0.9, positives=50, negatives=50)
    assert drift_interval(seen, known).value == pytest.approx(drift_interval(seen, exact).value / 0.8)
    widths = [drift_interval(seen, error) for error in (known, measured)]
    assert widths[1].high - widths[1].low > widths[0].high - widths[0].low
    hardly = JudgeError(sensitivity=0.9, specificity=0.9, positives=10, negatives=10)
    assert fewest_pairs(0.02, hardly) > fewest_pairs(0.02, known) > fewest_pairs(0.02, exact)


def test_the_factors_variance_is_that_of_two_shares():
    measured = JudgeError(sensitivity=0.8, specificity=1.0, positives=98, negatives=98)
    first, second = (0.8 * 98 + 1) / 100, 99 / 100
    assert measured.variance == pytest.approx((first * (1 - first) + second * (1 - second)) / 98)
    assert JudgeError(sensitivity=0.8, specificity=0.9).variance == 0


def test_a_judge_no_better_than_chance_is_refused():
    with pytest.raises(UserError, match=r"better than chance, got sensitivity 0\.5 and specificity 0.5"):
        JudgeError(sensitivity=0.5, specificity=0.5)


def test_a_judge_that_was_hardly_measured_can_show_nothing():
    with pytest.raises(UserError, match="Label more answers"):
        fewest_pairs(0.02, JudgeError(sensitivity=0.55, specificity=0.55, positives=2, negatives=2))


def test_clusters_count_as_their_effective_number():
    before, after = np.zeros(40, bool), np.repeat([True, False], [10, 30])
    whole = changed_pairs(before, after, np.repeat(np.arange(4), 10))  # each prompt changed wholly or not at all
    single = changed_pairs(before, after, np.arange(40))
    assert single == ChangedPairs(40, 10, 0)
    assert whole.pairs < 4
    assert whole.difference == pytest.approx(single.difference)
    assert changed_pairs(before, before, np.repeat(np.arange(4), 10)).pairs == 4  # nothing tells how alike they are


def test_the_advised_size_settles_it():
    seen = ChangedPairs(300, 4, 1)
    needed = pairs_needed(seen, 0.02, above=0.02, below=0.05)
    assert p_below(seen, 0.02) > 0.05
    assert p_below(seen.scaled(needed / 300), 0.02) <= 0.05
    assert pairs_needed(ChangedPairs(300, 6, 0), 0.02, above=0.02, below=0.05) is None  # exactly at the limit


def test_sides_of_different_lengths_are_refused(as_in_use):
    with pytest.raises(ValueError, match="as many values on either side"):
        changed_pairs(np.zeros(3, bool), np.zeros(2, bool))
