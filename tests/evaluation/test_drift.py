import numpy as np
import pytest
from PIL import Image

from valign.evaluation.images.drift import cosine_drift, pixel_rmse


def test_angles_by_hand():  # equal 0, right angle 1, opposite 2, 60 degrees 0.5; lengths do not matter
    before = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    after = np.array([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 3**0.5], [0.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(cosine_drift(before, after), [0, 1, 2, 0.5, 0, 1], atol=1e-12)


def test_equal_rows_drift_by_exactly_nothing():
    rows = np.random.default_rng(0).normal(size=(100, 17)).astype(np.float32)
    assert (cosine_drift(rows, rows) == 0).all()


def test_rmse_by_hand():  # one of three channels off by 255 everywhere: sqrt(1/3)
    black, white, red = (Image.new("RGB", (4, 4), colour) for colour in ("black", "white", "red"))
    np.testing.assert_allclose(pixel_rmse([black, black, white], [white, red, white]), [1, 3**-0.5, 0])


def test_unpaired_input_is_refused():
    with pytest.raises(ValueError, match=r"must get equal shapes, got \(2, 3\) and \(3, 3\)"):
        cosine_drift(np.ones((2, 3)), np.ones((3, 3)))
    with pytest.raises(ValueError, match="images of one size"):
        pixel_rmse([Image.new("RGB", (4, 4))], [Image.new("RGB", (8, 8))])
    with pytest.raises(ValueError, match="equally many images, got 1 and 0"):
        pixel_rmse([Image.new("RGB", (4, 4))], [])
