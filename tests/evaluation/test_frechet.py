import numpy as np
import pytest
from scipy.linalg import sqrtm

from valign.evaluation.images.frechet import FeatureMoments, frechet_distance, gaussian_distance, gaussian_of, size_warning


def by_definition(first, second):
    """The formula as published, with SciPy's matrix square root."""
    m1, m2, c1, c2 = first.mean(0), second.mean(0), np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    return ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)


def test_agrees_with_the_matrix_square_root():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(80, 6)), rng.normal(size=(80, 6)) @ rng.normal(size=(6, 6)) + 1
    assert frechet_distance(first, second) == pytest.approx(by_definition(first, second), rel=1e-8)


def test_closed_form_of_axis_aligned_gaussians():  # sum (m1 - m2)^2 + (s1 - s2)^2 = 9 + 16 + 1 + 4
    first = FeatureMoments(np.array([0.0, 0.0]), np.diag([1.0, 4.0]), 10)
    second = FeatureMoments(np.array([3.0, 4.0]), np.diag([4.0, 16.0]), 10)
    assert gaussian_distance(first, second) == pytest.approx(30.0)


def test_same_set_is_at_distance_zero_also_with_fewer_images_than_features():
    few = np.random.default_rng(0).normal(size=(10, 40))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, few[::-1]) == pytest.approx(0, abs=1e-6)


def test_a_pure_shift_costs_its_square_also_when_the_covariance_is_singular():
    few = np.random.default_rng(0).normal(size=(10, 40))
    assert frechet_distance(few, few + 0.5) == pytest.approx(40 * 0.25, rel=1e-6)


def test_symmetric_and_turns_with_the_space():
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(30, 5)), 2 * rng.normal(size=(30, 5))
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    there = frechet_distance(first, second)
    assert frechet_distance(second, first) == pytest.approx(there)
    assert frechet_distance(first @ turn, second @ turn) == pytest.approx(there)


def test_float32_features_are_lifted_to_float64():
    far = (np.random.default_rng(0).normal(size=(50, 3)) + 1e4).astype(np.float32)
    assert frechet_distance(far, far) == pytest.approx(0, abs=1e-5)


def test_unequal_sets_too_few_rows_and_nan_are_refused():
    with pytest.raises(ValueError, match="must get sets of one size, got 4 and 3 rows"):
        frechet_distance(np.ones((4, 2)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="at least 2 finite rows, got 1 rows"):
        gaussian_of(np.ones((1, 2)))
    with pytest.raises(ValueError, match="finite"):
        gaussian_of(np.full((3, 2), np.nan))


def test_warns_of_small_sets():
    assert "rank-deficient" in size_warning(64, 64)
    assert "fewer than 2048" in size_warning(500, 64)
    assert size_warning(2048, 64) == ""
