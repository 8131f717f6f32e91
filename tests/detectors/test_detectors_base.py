from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from valign.checks import UserError
from valign.detectors.base import check_pin, flagged, hash_weights, measure_error
from valign.interfaces import DetectorCard, scores_of


class Redness:
    """Harmful to the degree that an image is red."""

    card = DetectorCard("redness", ("red", "blue"), 0.5, "0" * 64)

    def detect(self, images):
        values = np.stack([np.asarray(image, dtype=float).mean((0, 1)) / 255 for image in images])
        return values[:, [0, 2]]


def colours(*names):
    return [Image.new("RGB", (4, 4), name) for name in names]


def test_a_image_is_harmful_when_any_class_reaches_the_threshold():
    card = DetectorCard("d", ("a", "b"), 0.5, "")
    assert flagged(np.array([[0.4, 0.49], [0.5, 0.0], [0.0, 0.9]]), card).tolist() == [False, True, True]


def test_more_score_never_unflags():
    card = DetectorCard("d", ("a", "b"), 0.5, "")
    rng = np.random.default_rng(0)
    low = rng.random((50, 2))
    high = np.minimum(1, low + rng.random((50, 2)) * 0.3)
    assert (flagged(high, card) >= flagged(low, card)).all()


def test_measured_error_counts_each_sort_apart():
    # harmful: 2 red (found), 1 green (missed); harmless: 1 black (passed), 1 white (flagged)
    card = measure_error(Redness(), colours("red", "red", "lime", "black", "white"), [True, True, True, False, False])
    assert (card.sensitivity, card.specificity) == (pytest.approx(2 / 3), 0.5)
    assert (card.positives, card.negatives) == (3, 2)


def test_error_of_one_sort_alone_is_refused():
    with pytest.raises(ValueError, match=r"measure_error\.harmful must label 2 images, some harmful and some not; got 2 labels, 2"):
        measure_error(Redness(), colours("red", "red"), [True, True])


def test_scores_outside_the_unit_interval_are_refused():
    class Loud(Redness):
        def detect(self, images):
            return np.full((len(images), 2), 1.5)

    with pytest.raises(ValueError, match=r"redness must score in \[0, 1\], got 1\.5"):
        scores_of(Loud(), colours("red"))
    assert scores_of(Redness(), []).shape == (0, 2)


def test_what_has_no_score_is_harmful():
    card = DetectorCard("d", ("a", "b"), 0.5, "")
    assert flagged(np.array([[0.1, np.nan], [0.1, 0.2]]), card).tolist() == [True, False]
    with pytest.raises(ValueError, match=r"redness must score in \[0, 1\], got nan"):
        scores_of(SimpleNamespace(card=Redness.card, detect=lambda images: np.full((1, 2), np.nan)), colours("red"))


def test_card_refuses_double_classes_and_impossible_rates():
    with pytest.raises(ValueError, match="must be distinct names"):
        DetectorCard("d", ("a", "a"), 0.5, "")
    with pytest.raises(ValueError, match=r"DetectorCard\.sensitivity must be in \[0, 1\], got 1\.2"):
        DetectorCard("d", ("a",), 0.5, "", sensitivity=1.2)
    with pytest.raises(ValueError, match=r"DetectorCard\.threshold must be in \(0, 1\], got 0"):
        DetectorCard("d", ("a",), 0.0, "")


def test_weights_hash_sees_content_and_names_and_refuses_pickles(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"must hold \.safetensors or \.onnx weights, found none"):
        hash_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = hash_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert hash_weights(tmp_path) != first
    with pytest.raises(UserError, match="Restore the pinned file"):
        check_pin("Probe", hash_weights(tmp_path), first)
