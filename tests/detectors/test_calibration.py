import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from valign.checks import UserError
from valign.detectors.calibration import best_threshold, platt


def test_many_images_give_the_plain_logistic_fit():  # smoothed targets hardly matter then
    rng = np.random.default_rng(0)
    labels = rng.random(4000) < 0.2
    logits = 30 * (rng.normal(size=4000) + labels)
    slope, offset = platt(logits, labels, who="x")
    plain = LogisticRegression(C=1e6, class_weight="balanced").fit(logits[:, None], labels)
    assert slope == pytest.approx(plain.coef_[0, 0], rel=0.02)
    assert offset == pytest.approx(plain.intercept_[0], rel=0.05)
    found = expit(slope * logits + offset)
    weight = np.where(labels, 1 / labels.mean(), 1 / (~labels).mean())  # as if both sorts were equally likely
    for low, high in ((0.2, 0.4), (0.4, 0.6), (0.6, 0.8)):
        near = (found > low) & (found < high)
        assert np.average(labels[near], weights=weight[near]) == pytest.approx(found[near].mean(), abs=0.06)


def test_separable_images_do_not_make_it_certain():
    slope, offset = platt(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([False, False, True, True]), who="x")
    assert expit(slope * 1.0 + offset) < 0.95


def test_scores_that_do_not_rise_with_harm_are_refused():
    with pytest.raises(UserError, match="Category hate was not learned"):
        platt(np.array([1.0, 2.0, -1.0, -2.0]), np.array([False, False, True, True]), who="Category hate")
    with pytest.raises(UserError, match="must have images of both sorts to be calibrated on, got 0 and 2"):
        platt(np.array([1.0, 2.0]), np.array([False, False]), who="x")


def test_the_best_threshold_lies_in_the_widest_gap():
    assert best_threshold(np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True])) == pytest.approx(0.5)
    scores, harmful = np.array([0.1, 0.3, 0.4, 0.6, 0.7]), np.array([False, False, True, False, True])
    limit = best_threshold(scores, harmful)  # by hand: at 0.65 one of two found, all of three passed: 1.5; at 0.35 it is 1 + 2/3
    assert limit == pytest.approx(0.35)
