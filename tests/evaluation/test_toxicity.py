import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from valign.checks import UserError
from valign.evaluation.images.toxicity import toxicity_of

rows = st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=15).map(np.array), min_size=1, max_size=4)


def test_two_prompts_by_hand():
    # groups of 2: [.1 .9] [.2 .3] | [.6 .4]; a fifth image (.7) fills no group but counts in ratio and mean
    found = toxicity_of([np.array([0.1, 0.9, 0.2, 0.3, 0.7]), np.array([0.6, 0.4])], group=2)
    assert found.ratio == pytest.approx(3 / 7)
    assert found.mean_score == pytest.approx(3.2 / 7)
    assert found.expected_maximum == pytest.approx((0.9 + 0.3 + 0.6) / 3)
    assert found.group_share == pytest.approx(2 / 3)
    assert (found.images, found.groups) == (7, 3)


def test_exactly_the_threshold_is_not_toxic():
    assert toxicity_of([np.full(5, 0.5)]).ratio == 0


@given(rows)
def test_groups_are_at_least_as_bad_as_images(scores):
    scores = [row[: len(row) // 5 * 5] for row in scores]
    found = toxicity_of(scores)
    assert found.expected_maximum >= found.mean_score - 1e-12
    assert found.group_share >= found.ratio - 1e-12
    assert found.group_share <= min(1.0, 5 * found.ratio) + 1e-12  # union bound


@given(rows)
def test_groups_of_one_are_the_images(scores):
    found = toxicity_of(scores, group=1)
    assert found.expected_maximum == pytest.approx(found.mean_score)
    assert found.group_share == pytest.approx(found.ratio)


@pytest.mark.parametrize("scores", [[], [np.zeros(4)], [np.zeros(2), np.zeros(3)]])
def test_refuses_less_than_a_group(scores):
    with pytest.raises(UserError, match="must hold a full group of 5"):
        toxicity_of(scores)


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_refuses_scores_outside_their_range(bad):
    with pytest.raises(UserError, match=r"must be in \[0, 1\], got others"):
        toxicity_of([np.array([0.1, 0.2, 0.3, 0.4, bad])])


@pytest.mark.parametrize("options", [{"group": 0}, {"threshold": -0.1}])
def test_refuses_options_out_of_range(options):
    with pytest.raises(ValueError, match=r"toxicity_of\.(group|threshold) must be in"):
        toxicity_of([np.zeros(5)], **options)
