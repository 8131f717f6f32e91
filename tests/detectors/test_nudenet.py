import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from valign.checks import UserError
from valign.detectors.base import flagged
from valign.detectors.nudenet import NudeNetDetector, counted_scores
from valign.policy import load_policy


def box(name, score):
    return {"class": name, "score": score, "box": [0, 0, 1, 1]}


def test_only_two_classes_count_and_the_best_box_wins():
    scores = counted_scores(
        [
            [box("FEMALE_BREAST_EXPOSED", 0.99), box("BUTTOCKS_EXPOSED", 0.9)],
            [box("MALE_GENITALIA_EXPOSED", 0.3), box("MALE_GENITALIA_EXPOSED", 0.7)],
            [],
        ]
    )
    assert scores.tolist() == [[0, 0], [0, 0.7], [0, 0]]


def test_a_score_that_is_no_number_is_not_a_zero():
    assert np.isnan(counted_scores([[box("MALE_GENITALIA_EXPOSED", float("nan")), box("MALE_GENITALIA_EXPOSED", 0.1)]])).any()


def test_more_boxes_never_lower_a_score():
    boxes = [box("FEMALE_GENITALIA_EXPOSED", 0.4)]
    assert (counted_scores([[*boxes, box("FEMALE_GENITALIA_EXPOSED", 0.1)]]) >= counted_scores([boxes])).all()


def test_reads_colours_in_the_order_of_opencv_and_pins_the_weights(monkeypatch, tmp_path):
    seen = []

    class NudeDetector:
        def __init__(self, model_path=None, inference_resolution=320):
            self.resolution = inference_resolution
            self.onnx_session = SimpleNamespace(run=lambda *inputs: [np.array(inputs)])

        def detect(self, array):
            seen.append(array)
            return [box("FEMALE_GENITALIA_EXPOSED", 0.2)]

    (tmp_path / "320n.onnx").write_bytes(b"weights")
    package = SimpleNamespace(NudeDetector=NudeDetector, __file__=str(tmp_path / "__init__.py"))
    monkeypatch.setitem(sys.modules, "nudenet", package)
    detector = NudeNetDetector()
    images = [Image.new("RGB", (2, 2), (255, 0, 7)), Image.new("RGBA", (2, 2)), Image.new("L", (50, 5000))]
    scores = detector.detect(images)[:1]
    assert seen[0][0, 0].tolist() == [7, 0, 255]
    assert seen[1][0, 0].tolist() == [255, 255, 255]  # transparent: white, as viewers show it
    assert seen[2].shape == (4096, 41, 3)  # NudeNet pads to a square of the longer side
    assert flagged(scores, detector.card).tolist() == [True]  # 0.2 counts
    measured = [name for name in load_policy("default").category_ids() if detector.card.measures(name)]
    assert measured == ["sexual"]  # one of the policy's seven
    assert np.asarray(scores).shape == (1, 2)
    assert detector.network.onnx_session.run(0.5)[0].tolist() == [0.5]
    with pytest.raises(ValueError, match="nudenet must give finite numbers, got NaN"):
        detector.network.onnx_session.run(float("nan"))  # NudeNet drops such boxes, as if nothing were there
    with pytest.raises(UserError, match="nudenet weights must have SHA-256 0, got"):
        NudeNetDetector(sha256="0")


def test_not_installed_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(UserError, match=r"pip install 'valign\[nudenet\]'"):
        NudeNetDetector()
