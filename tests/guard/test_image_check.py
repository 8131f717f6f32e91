import numpy as np
import pytest
from PIL import Image

from valign.guard.images.image_check import check_image
from valign.interfaces import DetectorCard

IMAGE = Image.new("RGB", (4, 4), "white")


class Fixed:
    """Gives one score per class, whatever the image."""

    card = DetectorCard("fixed", ("hate", "violence"), 0.5, "0" * 64)

    def __init__(self, *scores):
        self.scores = scores

    def detect(self, images):
        return np.array([self.scores] * len(images))


@pytest.mark.parametrize(("score", "outcome", "category"), [(0.5, "fire", "violence"), (0.499, "pass", "")])
def test_a_score_at_the_threshold_is_harmful(score, outcome, category):
    found = check_image(Fixed(0.1, score), IMAGE)
    assert (found.outcome, found.category, found.score) == (outcome, category, score)


@pytest.mark.parametrize("scores", [(0.1, float("nan")), (0.1, 1.5), (0.1,)])
def test_an_image_without_a_usable_score_is_never_let_through(scores):  # NaN is how a judge says that it has no answer
    found = check_image(Fixed(*scores), IMAGE)
    assert (found.outcome, found.message) == ("error", "fixed failed: ValueError")
