import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from valign.checks import UserError
from valign.detectors.base import (
    chance_notes,
    check_coverage,
    check_domain,
    check_pin,
    flagged,
    hash_weights,
    measure_error,
    verdicts,
)
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


def test_a_card_says_which_categories_each_class_measures():
    card = DetectorCard("d", ("gore", "nude"), 0.5, "", covers={"gore": ("violence", "shocking"), "nude": "sexual"})
    assert card.coverage == {"gore": ("violence", "shocking"), "nude": ("sexual",)}
    assert card.classes_for("shocking") == ("gore",)
    assert [card.measures(name) for name in ("sexual", "hate")] == [True, False]
    own_names = DetectorCard("d", ("hate", "other"), 0.5, "")
    assert own_names.coverage == {"hate": ("hate",), "other": ("other",)}
    assert DetectorCard("d", ("a", "b"), 0.5, "", covers="all").classes_for("hate") == ("a", "b")
    assert DetectorCard("d", ("a", "b"), 0.5, "", covers={"b": "all"}).classes_for("hate") == ("b",)


def test_a_card_survives_json():
    card = DetectorCard("d", ("a", "b"), 0.5, "", 0.9, 0.8, 5, 6, covers={"b": "all"}, domain=("world:shapes",), abstains=True)
    card = replace(card, by_category={"hate": [2, 3]})
    assert DetectorCard.from_json(json.loads(json.dumps(asdict(card)))) == card


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"covers": {"c": "hate"}}, r"DetectorCard\.covers must name classes of the detector, got 'c'\. It has a, b"),
        ({"covers": "hate"}, r'DetectorCard\.covers must be class -> categories, or "all", got \'hate\''),
        ({"covers": {"a": ("",)}}, r"DetectorCard\.covers must hold ids of categories, got an empty one"),
        ({"by_category": {"hate": (3, 2)}}, r"DetectorCard\.by_category must hold \(flagged, positives\), got \(3, 2\) for hate"),
        ({"domain": ("shapes",)}, r"DetectorCard\.domain must hold origins such as world:shapes, got 'shapes'"),
    ],
)
def test_coverage_and_domain_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        DetectorCard("d", ("a", "b"), 0.5, "", **given)


def test_the_error_within_a_category_is_its_own():
    card = DetectorCard("d", ("a",), 0.5, "", 0.6, 0.7, 20, 30, covers="all")
    assert card.within("hate") == card  # nobody counted by category
    counted = replace(card, by_category={"hate": (2, 10), "violence": (10, 10)})
    own = counted.within("violence")
    assert (own.sensitivity, own.positives, own.specificity, own.negatives) == (1.0, 10, 0.7, 30)
    assert (counted.within("sexual").sensitivity, counted.within("sexual").positives) == (None, None)
    assert [counted.within(name).better_than_chance() for name in ("hate", "violence", "sexual")] == [False, True, None]
    (said,) = chance_notes(counted, ["hate", "violence"])
    assert said.startswith("Detector d is no better than chance for hate: on its own test images it flags 2 of 10 of this category")
    assert chance_notes(counted, ["violence"]) == chance_notes(card, ["hate"]) == []


def test_harm_that_no_class_covers_is_not_measured():
    card = DetectorCard("d", ("nude",), 0.5, "", covers={"nude": "sexual"})
    scores = np.array([[0.1], [0.1], [0.9], [0.9], [0.1]])
    assert verdicts(scores, card, ["sexual", "hate", "hate", "sexual", ""]) == [False, None, None, True, False]


def test_an_answer_that_is_missing_is_not_measured_unless_another_class_saw_harm():
    card = DetectorCard("judge", ("a", "b"), 0.5, "", abstains=True)
    nan = float("nan")
    scores = np.array([[nan, 0.1], [0.1, nan], [nan, 0.9], [0.1, nan]])
    assert verdicts(scores, card, ["a", "a", "a", ""]) == [None, False, True, None]
    assert flagged(scores, card).tolist() == [True] * 4  # what lets images through takes no chance
    detector = SimpleNamespace(card=card, detect=lambda images: scores)
    assert np.isnan(scores_of(detector, colours(*["red"] * 4))).sum() == 4
    with pytest.raises(ValueError, match=r"judge must score in \[0, 1\], got nan"):
        scores_of(SimpleNamespace(card=replace(card, abstains=False), detect=lambda images: scores), colours(*["red"] * 4))


def test_the_error_is_of_the_images_that_got_an_answer():
    class Shy(Redness):
        card = replace(Redness.card, abstains=True)

        def detect(self, images):
            scores = super().detect(images)
            scores[0] = float("nan")
            return scores

    card = measure_error(Shy(), colours("red", "red", "lime", "black"), [True, True, True, False])
    assert (card.sensitivity, card.positives, card.negatives) == (0.5, 2, 1)
    with pytest.raises(ValueError, match=r"must answer for images of both sorts, got 0 harmful, 1 harmless"):
        measure_error(Shy(), colours("red", "black"), [True, False])


def test_a_detector_that_covers_none_of_the_categories_is_refused():
    card = DetectorCard("nudenet", ("nude",), 0.5, "", covers={"nude": "sexual"})
    assert check_coverage(card, ("hate", "sexual")) == ("sexual",)
    assert check_coverage(card, ()) == ()
    with pytest.raises(UserError, match=r"nudenet must measure one of the categories hate, violence; it measures sexual\."):
        check_coverage(card, ("hate", "violence"))


def test_a_detector_is_refused_outside_its_domain():
    card = DetectorCard("world-oracle", ("hate",), 0.5, "", domain=("world:shapes", "autoencoder:12"))
    check_domain(card, ("autoencoder:12",), "models/a")
    check_domain(replace(card, domain=()), (), "models/a")
    for origins in ((), ("world:chat", "autoencoder:13")):
        with pytest.raises(UserError, match=r"judges images of models of the world shapes only, and models/a is not one"):
            check_domain(card, origins, "models/a")
