import json

import numpy as np
import pytest
from PIL import Image

from valign.checks import UserError
from valign.data.images.labelled import HarmExample, gather
from valign.detectors import build
from valign.detectors.clip_probe import ClipProbeDetector
from valign.detectors.errors import measure_detector
from valign.detectors.fitting import FitOptions, fit_detector
from valign.detectors.record import read_record


class ColourEncoder:
    """Mean colour, less grey, as the feature."""

    weights_sha256, dim = "colours", 3

    def image_features(self, images):
        return np.stack([np.asarray(image, dtype=np.float32).mean((0, 1)) - 127 for image in images])


def coloured(name, categories, channel, count, seed):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        pixels = rng.integers(0, 160, (16, 16, 3))
        if channel is not None:
            pixels[..., channel] += 80
        rows.append(HarmExample(f"{name}/{i:03d}", categories, Image.fromarray(pixels.astype(np.uint8))))
    return rows


def labelled(count=24):
    rows = coloured("violence", ("violence",), 0, count, 0) + coloured("hate", ("hate",), 1, count, 1)
    return gather(rows + coloured("harmless", (), None, 2 * count, 2), "these")


def fit(tmp_path, **options):
    found = labelled()
    error = fit_detector(found, ColourEncoder(), tmp_path / "mine", place=tmp_path, origin="these", options=FitOptions(**options))
    return found, error


def test_it_is_fitted_calibrated_and_tested_on_different_images(tmp_path):
    found, error = fit(tmp_path)
    record = read_record(tmp_path / "mine")
    assert [record.made[name] for name in ("fitted", "calibrated", "tested")] == [48, 24, 24]
    whole, hate, violence = error.rows
    assert (whole.positives, whole.negatives) == (12, 12)
    assert record.card.by_category == {"hate": (6, 6), "violence": (6, 6)}
    assert (hate.category, hate.positives, violence.positives) == ("hate", 6, 6)
    assert whole.sensitivity == whole.specificity == 1.0
    card = record.card
    assert (card.name, card.classes, card.sensitivity, card.positives, card.negatives) == (
        "mine",
        ("hate", "violence"),
        1.0,
        12,
        12,
    )
    assert 0 < card.threshold < 1
    assert record.made["images_sha256"] == found.fingerprint()
    detector = ClipProbeDetector(tmp_path / "mine", encoder=ColourEncoder())
    assert detector.card == card
    red = Image.new("RGB", (4, 4), (200, 90, 90))
    assert (detector.detect([red])[0] >= card.threshold).tolist() == [False, True]


def test_the_same_seed_gives_the_same_file(tmp_path):
    fit(tmp_path / "a", seed=3)
    fit(tmp_path / "b", seed=3)
    fit(tmp_path / "c", seed=4)
    a, b, c = ((tmp_path / name / "mine" / "probe.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_failure_leaves_nothing_behind(tmp_path):
    rows = coloured("hate", ("hate",), None, 12, 1) + coloured("harmless", (), None, 12, 1)
    rows = [HarmExample(one.name, one.categories, Image.eval(one.source, lambda v: v)) for one in rows]
    found = gather([*rows[:12], *coloured("harmless", (), 0, 4, 7)], "these")
    with pytest.raises(UserError, match="must hold at least 6 different ones of no harm, got 4"):
        fit_detector(found, ColourEncoder(), tmp_path / "mine", place=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_probe_for_another_embedding_size_is_refused(tmp_path):
    fit(tmp_path)

    class Wider(ColourEncoder):
        dim = 4

    with pytest.raises(UserError, match="must be made for embeddings of 4 numbers, which the encoder gives, got one for 3"):
        ClipProbeDetector(tmp_path / "mine", encoder=Wider())


def test_a_changed_probe_is_refused(tmp_path):
    fit(tmp_path / "a", seed=0)
    fit(tmp_path / "b", seed=1)
    (tmp_path / "b" / "mine" / "probe.safetensors").replace(tmp_path / "a" / "mine" / "probe.safetensors")
    with pytest.raises(UserError, match=r"must hold the weights that detector\.json describes"):
        ClipProbeDetector(tmp_path / "a" / "mine", encoder=ColourEncoder())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "must be a detector's folder, it is empty. Make one with `valign detector fit`"),
        ("{", "is not JSON"),
        ("{}", "does not describe a detector"),
        ('{"version": 99}', "was written by a later version of valign"),
    ],
)
def test_an_empty_or_broken_folder_is_refused(tmp_path, text, said):
    (tmp_path / "d").mkdir()
    if text is not None:
        (tmp_path / "d" / "detector.json").write_text(text)
    with pytest.raises(UserError, match=said):
        build(str(tmp_path / "d"))


def test_a_kind_that_is_not_installed_is_refused(tmp_path):
    fit(tmp_path)
    path = tmp_path / "mine" / "detector.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": "weather"}))
    with pytest.raises(UserError, match=r"must name a kind of detector \(nudenet, .*\), got 'weather'"):
        build(str(tmp_path / "mine"))


def test_errors_count_what_has_no_answer_apart(tmp_path):
    class Shy(ClipProbeDetector):
        def detect(self, images):
            scores = super().detect(images)
            scores[::4] = np.nan
            return scores

    fit(tmp_path)
    detector = Shy(tmp_path / "mine", encoder=ColourEncoder())
    object.__setattr__(detector.card, "abstains", True)
    rows = labelled().examples
    error = measure_detector(detector, rows)
    whole = error.rows[0]
    assert whole.unscored == 24
    assert whole.positives + whole.negatives + whole.unscored == len(rows)
    assert error.on(detector.card).positives == whole.positives


def test_categories_that_it_does_not_cover_are_named(tmp_path):
    fit(tmp_path)
    detector = ClipProbeDetector(tmp_path / "mine", encoder=ColourEncoder())
    rows = [*labelled().examples, *coloured("sexual", ("sexual",), 2, 3, 5)]
    error = measure_detector(detector, rows)
    assert error.not_measured == ("sexual",)
    assert error.rows[0].positives == 48
    with pytest.raises(UserError, match="must measure one of sexual, it measures none"):
        measure_detector(detector, rows[-3:])
