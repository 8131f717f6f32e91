import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from valign.checks import UserError
from valign.evaluation.images.bias import bias_interval, bias_of, count_attributes, mean_bias

counts = st.lists(st.integers(0, 60), min_size=2, max_size=6).filter(sum).map(np.array)


def test_fifty_images_by_hand():
    # 40 and 10 of 50: D1 = 30 / 50; D2 = sqrt(0.3^2 + 0.3^2) = 0.42426...
    bias = bias_of(np.array([40, 10]))
    assert (bias.d1, bias.images) == (0.6, 50)
    assert bias.d2 == pytest.approx(0.4242640687119285)


def test_all_alike_and_all_equal():
    assert bias_of(np.array([25, 25])).d1 == bias_of(np.array([25, 25])).d2 == 0
    alone = bias_of(np.array([50, 0, 0, 0]))
    assert alone.d1 == 1
    assert alone.d2 == pytest.approx((1 - 1 / 4) ** 0.5)


@given(counts, st.randoms())
def test_order_and_scale_do_not_matter_and_ranges_hold(array, random):
    bias = bias_of(array)
    assert 0 <= bias.d1 <= 1
    assert 0 <= bias.d2 <= (1 - 1 / len(array)) ** 0.5 + 1e-12
    order = list(range(len(array)))
    random.shuffle(order)
    assert bias_of(array[order]).d2 == pytest.approx(bias.d2)
    assert bias_of(3 * array).d1 == pytest.approx(bias.d1)


@given(counts)
def test_two_attributes_tie_the_two_numbers(array):
    pair = np.array([array[0], array[1] + 1])
    assert bias_of(pair).d2 == pytest.approx(bias_of(pair).d1 / 2**0.5)


def test_images_count_for_their_highest_score():
    scores = np.array([[0.2, 0.1, 0.0], [0.1, 0.1, 0.0], [0.0, 0.3, 0.1]])
    assert count_attributes(scores).tolist() == [2, 1, 0]


def test_prompts_weigh_alike_whatever_their_number_of_images():
    bias = mean_bias({"a doctor": [4, 0], "a nurse": [20, 20]})
    assert (bias.d1, bias.images) == (0.5, 44)


@pytest.mark.parametrize("bad", [[3], [0, 0], [-1, 2]])
def test_refuses_what_is_no_count(bad):
    with pytest.raises(UserError, match="must be counts of at least 2 attributes"):
        bias_of(np.array(bad))


def test_refuses_no_prompt():
    with pytest.raises(UserError, match="at least one prompt"):
        mean_bias({})


shown = st.tuples(st.integers(1, 3), st.integers(1, 12)).flatmap(
    lambda shape: hnp.arrays("int64", shape, elements=st.integers(-1, 1))
)


@given(shown)
def test_the_interval_is_around_the_mean_of_what_is_known(array):
    counts = [np.bincount(row[row >= 0], minlength=2).tolist() for row in array]
    known = {str(n): count for n, count in enumerate(counts) if sum(count)}
    found = bias_interval(array, 2, samples=100)
    if not known:
        assert found is None
    else:
        assert found.value == pytest.approx(mean_bias(known).d1)
        assert 0 <= found.low <= found.high <= 1


def test_a_difference_is_paired_and_its_interval_shrinks_with_the_images():
    rng = np.random.default_rng(0)
    before = (rng.random((4, 200)) < 0.9).astype(int)
    assert bias_interval(before, 2, base=before) == bias_interval(before, 2, base=before.copy())
    same = bias_interval(before, 2, base=before)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    after = np.where(rng.random(before.shape) < 0.4, 1 - before, before)
    many, few = bias_interval(after, 2, base=before), bias_interval(after[:, :20], 2, base=before[:, :20])
    assert many.low < many.value < many.high < 0
    assert many.high - many.low < few.high - few.low


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(1), 0
    for trial in range(200):  # 80 of 100 show one attribute: D1 = 0.6, far from 0, where it is not biased
        found = bias_interval((rng.random((2, 100)) < 0.8).astype(int), 2, samples=400, seed=trial)
        hits += found.low <= 0.6 <= found.high
    assert 0.89 <= hits / 200 <= 0.99  # 95 %, four standard errors below
