import math
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from jaxtyping import config
from scipy.stats import binomtest
from scipy.stats import bootstrap as scipy_bootstrap

from valign.evaluation.statistics import (
    effective_size,
    holm,
    mcnemar,
    mean_interval,
    newcombe,
    paired_bootstrap,
    rogan_gladen,
    share_difference,
    share_interval,
    share_over_runs,
    sign_flip_test,
    t_interval,
    wilson,
)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys_and_holds_the_share(counts):
    count, total = counts
    ours, theirs = wilson(count, total), binomtest(count, total).proportion_ci(method="wilson")
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=1e-12), pytest.approx(theirs.high, abs=1e-12))
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


def test_wilson_closed_form_without_a_hit():  # z^2 / (n + z^2) at 95 %: 3.8415 / 103.8415
    assert wilson(0, 100).high == pytest.approx(0.0369935, abs=1e-6)
    assert wilson(0, 100).low == 0


@pytest.mark.parametrize(("count", "total"), [(1, 0), (5, 4), (-1, 4)])
def test_impossible_counts_are_refused(count, total):
    with pytest.raises(ValueError, match=r"wilson\.(total|count) must be in"):
        wilson(count, total)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_the_binomial_test_of_the_changed_pairs(pairs):
    before, after = np.array(pairs).T
    found = mcnemar(before, after)
    changed = found.lost + found.gained
    assert found.exact == pytest.approx(binomtest(found.lost, changed).pvalue if changed else 1.0, abs=1e-12)
    assert 0 < found.mid_p <= found.exact <= 1
    swapped = mcnemar(after, before)
    assert (swapped.lost, swapped.gained, swapped.exact) == (found.gained, found.lost, found.exact)


def test_mcnemar_mid_p_by_hand():  # 1 lost, 4 gained: 2 (C(5,0) + C(5,1)) / 32 = 0.375; minus C(5,1) / 32 = 0.21875
    before = np.array([True] + [False] * 4 + [True] * 7)
    after = np.array([False] + [True] * 4 + [True] * 7)
    found = mcnemar(before, after)
    assert (found.lost, found.gained, found.exact, found.mid_p) == (1, 4, pytest.approx(0.375), pytest.approx(0.21875))


def test_bootstrap_agrees_with_scipy_and_with_the_normal_interval():
    rng = np.random.default_rng(3)
    before, after = rng.normal(0, 1, 200), rng.normal(0.4, 1, 200)
    ours = paired_bootstrap(before, after, np.arange(200), samples=8000)
    theirs = scipy_bootstrap((after - before,), np.mean, n_resamples=8000, method="percentile", rng=np.random.default_rng(1))
    half = 1.96 * (after - before).std() / 200**0.5
    assert ours.value == pytest.approx((after - before).mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.01)
    assert ours.high - ours.low == pytest.approx(2 * half, rel=0.05)


def test_bootstrap_of_shares_redraws_as_many_prompts_as_there_are():  # 0/1 outcomes: half width 1.96 sqrt(p (1 - p) / 200)
    after = np.arange(200) < 60
    found = paired_bootstrap(np.zeros(200), after.astype(float), np.arange(200), samples=20000)
    half = 1.96 * (0.3 * 0.7 / 200) ** 0.5
    assert found.value == pytest.approx(0.3)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)


def test_bootstrap_over_every_possible_draw():  # 3 clusters: all 27 draws by hand, the interval at 80 % within one step of theirs
    values = np.array([0.0, 0.0, 1.0, 5.0])
    clusters = np.array(["a", "a", "b", "c"])
    sums, sizes = np.array([0.0, 1.0, 5.0]), np.array([2.0, 1.0, 1.0])
    draws = [sums[list(d)].sum() / sizes[list(d)].sum() for d in np.ndindex(3, 3, 3)]
    low, high = np.quantile(draws, [0.1, 0.9], method="inverted_cdf")
    found = paired_bootstrap(np.zeros(4), values, clusters, samples=20000, level=0.8)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_seeds_of_one_prompt_do_not_count_twice():
    rng = np.random.default_rng(0)
    values, prompts = rng.random(50), np.arange(50)
    once = mean_interval(values, prompts)
    ten_times = mean_interval(np.tile(values, 10), np.tile(prompts, 10))
    assert (once.low, once.high) == (pytest.approx(ten_times.low), pytest.approx(ten_times.high))


def test_bootstrap_is_the_same_on_every_run_and_follows_its_seed():
    before, after, prompts = np.zeros(30), np.arange(30.0), np.arange(30)
    assert paired_bootstrap(before, after, prompts) == paired_bootstrap(before, after, prompts)
    assert paired_bootstrap(before, after, prompts, seed=1) != paired_bootstrap(before, after, prompts)


@pytest.mark.parametrize(("both", "first", "second", "neither"), [(36, 12, 2, 0), (1, 1, 7, 12), (40, 3, 9, 48), (0, 20, 0, 0)])
def test_newcombe_by_the_published_steps(both, first, second, neither):
    n = both + first + second + neither
    p1, p2 = (both + first) / n, (both + second) / n
    one, two = (binomtest(k, n).proportion_ci(method="wilson") for k in (both + first, both + second))
    product = both * neither - first * second
    product = max(product - n / 2, 0) if product > 0 else product
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    phi = product / margins**0.5 if margins else 0
    down, up, left, right = p1 - one.low, two.high - p2, p2 - two.low, one.high - p1
    low = p1 - p2 - (down**2 - 2 * phi * down * up + up**2) ** 0.5
    high = p1 - p2 + (left**2 - 2 * phi * left * right + right**2) ** 0.5
    cells = np.repeat([0, 1, 2, 3], [both, first, second, neither])
    found = newcombe(np.isin(cells, [0, 2]), np.isin(cells, [0, 1]))  # second is before, first is after
    assert found.value == pytest.approx(p1 - p2)
    assert (found.low, found.high) == (pytest.approx(max(low, -1)), pytest.approx(min(high, 1)))


def test_newcombe_turns_round_with_its_sides():
    rng = np.random.default_rng(5)
    before, after = rng.random(40) < 0.6, rng.random(40) < 0.3
    there, back = newcombe(before, after), newcombe(after, before)
    assert (there.value, there.low, there.high) == (pytest.approx(-back.value), pytest.approx(-back.high), pytest.approx(-back.low))


def test_a_total_change_is_still_uncertain():
    found = share_difference(np.ones(40, dtype=bool), np.zeros(40, dtype=bool), np.arange(40))
    assert found.value == found.low == -1
    assert -0.95 < found.high < -0.8


def test_rogan_gladen_by_hand():  # (0.3 + 0.95 - 1) / (0.9 + 0.95 - 1) = 0.25 / 0.85
    found = rogan_gladen(30, 100, 0.9, 0.95)
    seen = wilson(30, 100)
    assert found.value == pytest.approx(0.25 / 0.85)
    assert (found.low, found.high) == (pytest.approx((seen.low - 0.05) / 0.85), pytest.approx((seen.high - 0.05) / 0.85))


@given(st.floats(0, 1), st.floats(0.7, 1), st.floats(0.7, 1))
def test_rogan_gladen_undoes_the_detectors_error(share, sensitivity, specificity):
    total = 10**6
    seen = round(total * (share * sensitivity + (1 - share) * (1 - specificity)))
    assert rogan_gladen(seen, total, sensitivity, specificity).value == pytest.approx(share, abs=1e-5)


def test_rogan_gladen_with_a_perfect_detector_changes_nothing():
    assert astuple(rogan_gladen(7, 50, 1.0, 1.0)) == pytest.approx(astuple(wilson(7, 50)))


def test_a_small_test_of_the_detector_widens_the_interval():
    known, large, small = (rogan_gladen(30, 200, 0.9, 0.95, positives=n, negatives=n) for n in (None, 100_000, 60))
    assert large.high - large.low == pytest.approx(known.high - known.low, rel=0.02)
    assert small.high - small.low > 1.3 * (known.high - known.low)


@pytest.mark.parametrize(("hits", "limits"), [(60, (0.172883572784, 0.386526871681)), (160, (0.786037566992, 1.0))])
def test_lang_reiczigel_by_the_published_steps(hits, limits):
    """Their equations in 40 decimal digits, apart from this package; 54 of 60 positives and 38 of 40 negatives were right.

    n' = 200 + z^2, P = (hits + z^2 / 2) / n', Se = 55 / 62, Sp = 39 / 42, share = (P + Sp - 1) / (Se + Sp - 1), shifted by
    2 z^2 (share Se (1 - Se) / 62 - (1 - share) Sp (1 - Sp) / 42).
    """
    found = rogan_gladen(hits, 200, 0.9, 0.95, positives=60, negatives=40)
    assert (found.low, found.high) == pytest.approx(limits, abs=1e-9)


@given(
    st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    st.integers(1, 40),
    st.integers(1, 40),
    st.data(),
)
@example((0, 1), 1, 17, None)
def test_a_corrected_interval_holds_its_value(counts, positives, negatives, data):
    sensitivity = (data.draw(st.integers(1, positives)) if data else 1) / positives
    specificity = (data.draw(st.integers(1, negatives)) if data else 1) / negatives
    assume(sensitivity + specificity > 1.001)
    found = rogan_gladen(*counts, sensitivity, specificity, positives=positives, negatives=negatives)
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(("right", "of"), [(1, 8), (0, 8)])
def test_a_detector_seen_on_a_handful_of_images_leaves_every_share_possible(right, of):  # 4/5 + 2/10 - 1 and 4/5 + 1/10 - 1
    found = rogan_gladen(5, 10, 1.0, right / of + 1e-9, positives=3, negatives=8)
    assert (found.low, found.high) == (0.0, 1.0)


def test_lang_reiczigel_covers_the_truth():
    rng, hits, truth, sensitivity, specificity = np.random.default_rng(1), 0, 0.2, 0.85, 0.9
    for _ in range(1000):
        seen = rng.binomial(300, truth * sensitivity + (1 - truth) * (1 - specificity))
        found = rogan_gladen(
            int(seen), 300, rng.binomial(80, sensitivity) / 80, rng.binomial(80, specificity) / 80, positives=80, negatives=80
        )
        hits += found.low <= truth <= found.high
    assert 930 <= hits <= 985


def test_a_detector_no_better_than_chance_corrects_nothing():
    with pytest.raises(ValueError, match="no better than chance"):
        rogan_gladen(3, 10, 0.5, 0.5)


def test_unequal_sides_are_refused():
    with pytest.raises(ValueError, match=r"mcnemar must get equally many values on every side and at least one, got 2, 3"):
        mcnemar(np.ones(2), np.ones(3))


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20))
def test_students_interval_is_that_of_scipy(values):
    from scipy import stats

    found, spread = t_interval(np.array(values)), np.std(values, ddof=1)
    assume(spread > 1e-6)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=spread / len(values) ** 0.5)
    assert np.allclose((found.low, found.high), (low, high))
    assert found.value == pytest.approx(np.mean(values))


def test_a_share_over_runs_is_as_uncertain_as_its_requests_and_its_runs():
    alike = share_over_runs([20, 20, 20], 100)
    assert astuple(alike) == pytest.approx(astuple(wilson(20, 100)))  # more runs do not make up for few requests
    assert share_over_runs([20], 100) == wilson(20, 100)
    found = share_over_runs([10, 20, 30], 100)  # sd 0.1, t(2) 4.3027: half a width of 0.2484 over runs
    assert found.value - found.low == pytest.approx(min(0.2, math.hypot(0.2484, 0.2 - wilson(20, 100).low)), abs=1e-4)
    assert found.high - found.value == pytest.approx(math.hypot(0.2484, wilson(20, 100).high - 0.2), abs=1e-4)
    assert share_over_runs([0, 0], 50).high == pytest.approx(wilson(0, 50).high)


@pytest.mark.parametrize("pairs", [3, 10, 14])
def test_sign_flips_are_counted_exactly(pairs):
    assert sign_flip_test(np.full(pairs, 0.5)) == 2 / 2**pairs
    assert sign_flip_test(np.zeros(pairs)) == 1.0
    assert sign_flip_test(np.array([1.0, -1.0])) == 1.0


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_sign_flips_do_not_care_for_the_sign(values):
    assert sign_flip_test(np.array(values)) == sign_flip_test(-np.array(values))


def test_many_pairs_are_drawn_and_agree_with_students_test():
    from scipy import stats

    values = np.random.default_rng(0).normal(0.4, 1, 40)
    assert sign_flip_test(values) == sign_flip_test(values)
    assert sign_flip_test(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.02)


def test_a_drawn_p_value_is_never_zero():  # (0 + 1) / (20000 + 1)
    assert sign_flip_test(np.full(40, 1.0)) == pytest.approx(1 / 20001)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@st.composite
def clustered(draw):
    """0/1 outcomes before and after, and a cluster of each pair."""
    rows = draw(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 9)), min_size=2, max_size=40))
    before, after, clusters = map(np.array, zip(*rows))
    return before, after, clusters


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40), st.integers(0, 2**32 - 1))
def test_clusters_of_one_row_change_no_digit(pairs, seed):
    before, after = np.array(pairs).T
    clusters = np.random.default_rng(seed).permutation(len(pairs))
    assert effective_size(after, clusters) is None
    assert share_interval(after, clusters) == wilson(int(after.sum()), len(after))
    assert mcnemar(before, after, clusters) == mcnemar(before, after)
    assert newcombe(before, after, clusters) == newcombe(before, after)


def test_effective_size_by_hand():
    """Clusters of 4 with 4, 4, 0, 1 hits: p = 9/16, deviations 7/4, 7/4, -9/4, -5/4, squares 12.75.

    Variance of p: 4/3 * 12.75 / 16^2; of 16 free rows: (9/16) (7/16) / 16; deff = 17 / 3.9375 = 272/63.
    """
    outcomes = np.array([1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0])
    clusters = np.repeat(list("abcd"), 4)
    few = (1.959963984540054 / 3.182446305284263) ** 2  # z / t with 3 degrees of freedom, 95 %
    assert effective_size(outcomes, clusters) == pytest.approx(16 * 63 / 272 * few)
    assert effective_size(np.ones(16), clusters) == 4  # all equal: nothing is known but the number of clusters
    assert effective_size(outcomes, np.zeros(16)) == 1
    assert effective_size(outcomes[:2], clusters[:2]) == 1


def test_wilson_of_an_effective_size():  # as if 15 of 50 had been seen
    found = wilson(120, 400, size=50)
    assert (found.value, found.low, found.high) == pytest.approx(astuple(wilson(15, 50)))
    corrected = rogan_gladen(120, 400, 0.9, 0.95, positives=60, negatives=60, size=50)
    assert astuple(corrected) == pytest.approx(astuple(rogan_gladen(15, 50, 0.9, 0.95, positives=60, negatives=60)))


@given(clustered())
def test_whole_clusters_are_flipped(rows):
    """Every pattern of signs of the clusters' sums, one by one."""
    before, after, clusters = rows
    assume(np.unique(clusters, return_counts=True)[1].max() > 1)
    sums = [int(after[clusters == c].sum()) - int(before[clusters == c].sum()) for c in np.unique(clusters)]
    drawn = np.array([np.dot(1 - 2 * np.array(signs), sums) for signs in np.ndindex(*[2] * len(sums))])
    far, same = (drawn <= -abs(sum(sums))).mean(), (drawn == -abs(sum(sums))).mean()
    found = mcnemar(before, after, clusters)
    assert found.exact == pytest.approx(min(1, 2 * far))
    assert found.mid_p == pytest.approx(min(1, 2 * far - same))


def test_equal_seeds_of_a_prompt_are_one_answer():
    before, after = np.arange(30) < 20, np.arange(30) % 3 == 0
    clusters = np.tile(np.arange(30), 8)
    found, once = mcnemar(np.tile(before, 8), np.tile(after, 8), clusters), mcnemar(before, after)
    assert (found.exact, found.mid_p) == (pytest.approx(once.exact), pytest.approx(once.mid_p))
    assert (found.lost, found.gained) == (8 * once.lost, 8 * once.gained)
    same = share_difference(np.tile(before, 8), np.tile(before, 8), clusters)
    assert same.low < -0.02 < 0.02 < same.high  # as wide as 30 prompts allow, not 240


def test_a_cluster_test_never_gives_zero():
    assert mcnemar(np.ones(4000), np.zeros(4000), np.repeat(np.arange(2000), 2)).exact > 0


def test_eight_seeds_per_prompt_keep_their_level():
    """Seeds of a prompt are alike and nothing changed: 5 % of the tests may fire, 5 % of the intervals may miss."""
    rng, tests, fired, naive, missed = np.random.default_rng(2), 1000, 0, 0, 0
    prompts, seeds = 40, 8
    clusters = np.repeat(np.arange(prompts), seeds)
    for _ in range(tests):
        chance = rng.beta(0.3, 0.3, (2, prompts, 1))  # the prompt's own share, before and after
        before, after = (rng.random((2, prompts, seeds)) < chance).reshape(2, -1)
        fired += mcnemar(before, after, clusters).exact < 0.05
        naive += mcnemar(before, after).exact < 0.05
        found = share_interval(before, clusters)
        missed += not found.low <= 0.5 <= found.high
    assert naive > 0.3 * tests
    assert 0.03 * tests < fired < 0.07 * tests
    assert 0.03 * tests < missed < 0.07 * tests


def test_shares_are_bootstrapped_where_prompts_changed_differently():
    before, after = np.array([1, 0, 1, 1, 0, 0], dtype=bool), np.array([1, 1, 0, 1, 1, 0], dtype=bool)
    clusters = np.array([0, 0, 1, 1, 2, 2])  # mean changes 1/2, -1/2, 1/2
    numbers = before.astype(float), after.astype(float), clusters
    assert share_difference(before, after, clusters) == paired_bootstrap(*numbers, seed=0)
    assert share_difference(before, after, clusters, seed=1) == paired_bootstrap(*numbers, seed=1)
    assert share_difference(before, after, clusters) != share_difference(before, after, np.arange(6))


YES = np.array([True, False, True])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson(1, 0), "wilson.total must be in [1, inf), got 0.0. There is nothing to count."),
        (lambda: wilson(5, 4), "wilson.count must be in [0, 4], got 5.0."),
        (lambda: wilson(1, 2, level=0.0), "level must be in (0, 1], got 0.0."),
        (lambda: wilson(1, 2, level=1.0), "level must be in (0, 1], got 1.0."),
        (lambda: wilson(1, 2, level=2.0), "level must be in (0, 1], got 2.0."),
        (
            lambda: t_interval(np.ones(1)),
            "t_interval.values must be in [2, inf), got 1.0. One value says nothing of how far others would spread.",
        ),
        (lambda: t_interval(np.ones(3), level=1.0), "level must be in (0, 1], got 1.0."),
        (lambda: t_interval(np.ones(3), level=0.0), "level must be in (0, 1], got 0.0."),
        (
            lambda: sign_flip_test(np.ones(0)),
            "sign_flip_test.differences must be in [1, inf), got 0.0. There is nothing to compare.",
        ),
        (lambda: rogan_gladen(1, 0, 0.9, 0.9), "rogan_gladen.total must be in [1, inf), got 0.0. There is nothing to count."),
        (lambda: rogan_gladen(5, 4, 0.9, 0.9), "rogan_gladen.count must be in [0, 4], got 5.0."),
        (lambda: rogan_gladen(1, 2, 1.5, 0.9), "rogan_gladen.sensitivity must be in [0, 1], got 1.5."),
        (lambda: rogan_gladen(1, 2, -0.5, 0.9), "rogan_gladen.sensitivity must be in [0, 1], got -0.5."),
        (lambda: rogan_gladen(1, 2, 0.9, 1.5), "rogan_gladen.specificity must be in [0, 1], got 1.5."),
        (lambda: rogan_gladen(1, 2, 0.9, -0.5), "rogan_gladen.specificity must be in [0, 1], got -0.5."),
        (
            lambda: rogan_gladen(1, 2, 0.5, 0.5),
            "sensitivity + specificity - 1 must be in (0, inf), got 0.0. The detector is no better than chance.",
        ),
        (
            lambda: rogan_gladen(1, 2, 0.0, 1.0),
            "sensitivity + specificity - 1 must be in (0, inf), got 0.0. The detector is no better than chance.",
        ),
        (
            lambda: rogan_gladen(1, 2, 1.0, 0.0),
            "sensitivity + specificity - 1 must be in (0, inf), got 0.0. The detector is no better than chance.",
        ),
        (
            lambda: effective_size(YES, np.arange(2)),
            "effective_size must get equally many values on every side and at least one, got 3, 2.",
        ),
        (
            lambda: mcnemar(YES, YES, np.arange(2)),
            "mcnemar must get equally many values on every side and at least one, got 3, 3, 2.",
        ),
        (lambda: mcnemar(YES[:0], YES[:0]), "mcnemar must get equally many values on every side and at least one, got 0, 0."),
        (lambda: newcombe(YES[:0], YES[:0]), "newcombe must get equally many values on every side and at least one, got 0, 0."),
        (lambda: newcombe(YES, np.ones(2)), "newcombe must get equally many values on every side and at least one, got 3, 2."),
        (
            lambda: mean_interval(np.ones(0), np.arange(0)),
            "paired_bootstrap must get equally many values on every side and at least one, got 0, 0, 0.",
        ),
        (
            lambda: paired_bootstrap(np.ones(3), np.ones(3), np.arange(3), samples=99),
            "paired_bootstrap.samples must be in [100, inf), got 99.0.",
        ),
    ],
)
def test_what_is_refused_is_named_with_its_range(call, message, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # as users run it: without the tests' type checks
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    assert str(caught.value) == message


def test_the_ends_of_each_range_are_allowed():
    assert astuple(wilson(0, 1)) == pytest.approx((0, 0, 0.793450685622763))  # z^2 / (1 + z^2)
    assert wilson(1, 1).value == 1
    assert wilson(1, 2, level=1 - 1e-12).high < 1
    assert wilson(1, 2, level=1e-9).high == pytest.approx(0.5)
    assert paired_bootstrap(np.zeros(3), np.ones(3), np.arange(3), samples=100).value == 1
    assert t_interval(np.array([1.0, 2.0]), level=1 - 1e-12).low < 0
    assert rogan_gladen(1, 4, 1.0, 0.25).value == 0  # sees 3/4 of the others as well
    assert rogan_gladen(1, 4, 0.5, 1.0).value == 0.5
    assert astuple(t_interval(np.array([3.5, 3.5]))) == (3.5, 3.5, 3.5)
    assert sign_flip_test(np.array([2.0])) == 1.0


def test_other_levels_by_hand():
    """z = 1.644853627 at 90 %, t = 2.353363435 with 3 and 2.919985580 with 2 degrees of freedom; apart from this package."""
    assert astuple(wilson(15, 50, level=0.9)) == pytest.approx((0.3, 0.20593364691142896, 0.414599627403079))
    assert astuple(wilson(15, 50, size=20, level=0.9)) == pytest.approx((0.3, 0.16385941535194345, 0.4838037195924422))
    assert astuple(t_interval(np.array([1.0, 2.0, 4.0]), level=0.9)) == pytest.approx((7 / 3, -0.241851892505, 4.908518559172))
    known = rogan_gladen(30, 100, 0.9, 0.95, level=0.9)
    assert astuple(known) == pytest.approx((0.25 / 0.85, 0.21259406396370029, 0.3880378046401463))
    measured = rogan_gladen(60, 200, 0.9, 0.95, positives=60, negatives=40, level=0.9)
    assert astuple(measured) == pytest.approx((0.25 / 0.85, 0.19008217390078908, 0.3696261163272716))


def test_effective_size_of_unequal_clusters_by_hand():
    """1 of 1, 2 of 2, 0 of 3, 2 of 4: p = 1/2, deviations 1/2, 1, -3/2, 0, squares 7/2; deff = 4/3 * 7/2 / (10 / 4) = 28/15."""
    clusters = np.repeat([7, 3, 9, 1], [1, 2, 3, 4])
    outcomes = np.array([1, 1, 1, 0, 0, 0, 1, 1, 0, 0])
    assert effective_size(outcomes, clusters) == pytest.approx(2.031922970375874)
    assert effective_size(outcomes, clusters, level=0.8) == pytest.approx(3.2802970776502423)
    found = share_interval(outcomes, clusters, level=0.8)
    assert astuple(found) == pytest.approx((0.5, 0.211194365138684, 0.788805634861316))


def test_effective_size_stays_between_one_and_the_number_of_rows():
    unlike = np.tile([1, 0], 4), np.repeat(np.arange(4), 2)  # every cluster has one of each: deff would be 0, and counts as 1
    assert effective_size(*unlike) == pytest.approx(8 * (1.959963984540054 / 3.182446305284263) ** 2)
    alike = np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1])  # t = 12.7 with 1 degree of freedom
    assert effective_size(*alike) == 1
    assert effective_size(np.zeros(6), np.repeat(np.arange(3), 2)) == 3
    assert effective_size(np.ones(6), None) is None


def test_any_number_but_zero_is_a_yes():
    numbers = np.array([0, 2, 3, 0, 1])
    assert share_interval(numbers) == wilson(3, 5)
    before, after = np.array([0.0, 2.0, 0.5, 1.0]), np.array([3.0, 0.0, 1.0, 0.0])
    assert mcnemar(before, after) == mcnemar(before > 0, after > 0)
    assert (mcnemar(before, after).lost, mcnemar(before, after).gained) == (2, 1)
    assert newcombe(before, after) == newcombe(before > 0, after > 0)


def test_the_smallest_p_value_of_a_cluster_test():
    found = mcnemar(np.ones(4000), np.zeros(4000), np.repeat(np.arange(2000), 2))
    assert (found.lost, found.gained) == (4000, 0)
    assert (found.exact, found.mid_p) == (2 * np.finfo(float).tiny, 2 * np.finfo(float).tiny)
    assert astuple(mcnemar(np.ones(4), np.ones(4), np.zeros(4))) == (0, 0, 1.0, 1.0)


def test_a_bootstrap_in_parts_is_one_bootstrap():
    """10,000 prompts and 450 samples are redrawn in three parts; the same draws at once, with a weighted mean each."""
    difference = np.random.default_rng(4).normal(size=10_000)
    found = paired_bootstrap(np.zeros(10_000), difference, np.arange(10_000), samples=450, seed=3, level=0.9)
    ordered = np.sort(difference)
    times = np.random.default_rng(3).multinomial(10_000, np.full(10_000, 1e-4), size=450)
    low, high = np.quantile(times @ ordered / 10_000, [0.05, 0.95])
    assert (found.low, found.high) == (pytest.approx(low, rel=1e-9), pytest.approx(high, rel=1e-9))


def test_what_is_not_asked_for_is_2000_samples_of_seed_0_at_95_percent():
    rng = np.random.default_rng(8)
    before, after, clusters = rng.random(30), rng.random(30), np.repeat(np.arange(10), 3)
    asked = paired_bootstrap(before, after, clusters, samples=2000, seed=0, level=0.95)
    assert paired_bootstrap(before, after, clusters) == asked
    assert mean_interval(after, clusters) == paired_bootstrap(np.zeros(30), after, clusters, samples=2000, seed=0)
    chosen = mean_interval(after, clusters, samples=300, seed=5)
    assert chosen == paired_bootstrap(np.zeros(30), after, clusters, samples=300, seed=5)
    assert asked != paired_bootstrap(before, after, clusters, samples=2001)
    assert wilson(3, 7) == wilson(3, 7, level=0.95)


def test_newcombe_of_clusters_by_hand():
    """8 clusters of 4, 90 %, z / t = 1.644853627 / 1.894578605; 14 both, 4 lost, 2 gained, 12 neither.

    18 before and 16 after, design effects 1.3242630385 and 2, so 18.2139851 and 12.0600536 rows; N = 32^2 / 12.0600536 = 84.9084118
    pairs, phi = (14 * 12 - 4 * 2 - N / 2) / sqrt(18 * 14 * 16 * 16) = 0.4627930637.
    """
    before = np.repeat([1, 1, 0, 0], [14, 4, 2, 12]).astype(bool)
    after = np.repeat([1, 0, 1, 0], [14, 4, 2, 12]).astype(bool)
    clusters = np.concatenate([np.tile(np.arange(8), 2), np.repeat(np.arange(4, 8), 4)])
    found = newcombe(before, after, clusters, level=0.9)
    assert astuple(found) == pytest.approx((-0.0625, -0.2652374728098586, 0.14648340495480336))
    back = newcombe(after, before, clusters, level=0.9)
    assert astuple(back) == pytest.approx((0.0625, -0.14648340495480336, 0.2652374728098586))


def test_a_total_change_of_three_clusters_reaches_the_ends():
    before, clusters = np.ones(6, dtype=bool), np.repeat(np.arange(3), 2)
    down, up = newcombe(before, ~before, clusters), newcombe(~before, before, clusters)
    assert (down.value, down.low, up.value, up.high) == (-1, -1, 1, 1)
    assert share_difference(before, ~before, clusters) == down
    assert up.low == pytest.approx(1 - 2**0.5 * wilson(0, 3).high)


def test_sign_flips_of_more_than_14_pairs_by_their_draws():
    values = np.linspace(-1, 2, 15)
    signs = np.random.default_rng(2).choice([-1.0, 1.0], size=(500, 15))
    reached = sum(abs(float((row * values).sum())) >= 7.5 - 1e-9 for row in signs)  # the sum of the values is 7.5
    assert sign_flip_test(values, samples=500, seed=2) == (reached + 1) / 501
    assert sign_flip_test(values) == sign_flip_test(values, samples=20_000, seed=0)
    assert sign_flip_test(values[1:]) * 2**14 == round(sign_flip_test(values[1:]) * 2**14)


def test_a_corrected_share_is_cut_to_the_unit_interval():
    assert astuple(rogan_gladen(0, 50, 0.9, 0.9))[:2] == (0.0, 0.0)
    assert (rogan_gladen(50, 50, 0.9, 0.9).value, rogan_gladen(50, 50, 0.9, 0.9).high) == (1.0, 1.0)
    assert rogan_gladen(30, 100, 0.9, 0.95, positives=60) == rogan_gladen(30, 100, 0.9, 0.95)
    assert rogan_gladen(30, 100, 0.9, 0.95, negatives=60) == rogan_gladen(30, 100, 0.9, 0.95)
    few = rogan_gladen(120, 400, 0.9, 0.95, size=50)
    assert astuple(few) == pytest.approx(astuple(rogan_gladen(15, 50, 0.9, 0.95)))
    chance = rogan_gladen(5, 10, 1.0, 1 / 8, positives=3, negatives=8)  # 4/5 + 2/10 - 1 is 0
    assert (chance.low, chance.high) == (0.0, 1.0)
