import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import cohen_kappa_score

from valign.detectors.any_of import AnyOf
from valign.evaluation.agreement import Agreement, agreements, cohen_kappa
from valign.evaluation.images.folder import ImageFolder
from valign.evaluation.report.disagreements import agreement_sections, kappa_text
from valign.evaluation.results import ImageResult
from valign.evaluation.suite import EvalPrompt, Suite
from valign.interfaces import DetectorCard


def bits(text):
    return np.array([letter == "1" for letter in text], dtype=bool)


def test_by_hand():  # observed 6/8; expected 4/8 * 4/8 + 4/8 * 4/8 = 1/2; kappa = (3/4 - 1/2) / (1/2) = 1/2
    found = cohen_kappa(bits("11101000"), bits("11110000"), np.arange(8))
    assert found.value == pytest.approx(0.5)
    assert found.low <= 0.5 <= found.high


def test_as_scikit_learn_says():
    rng = np.random.default_rng(0)
    first = rng.random(300) < 0.3
    second = np.where(rng.random(300) < 0.8, first, rng.random(300) < 0.5)
    found = cohen_kappa(first, second, np.arange(300))
    assert found.value == pytest.approx(cohen_kappa_score(first, second))
    assert 0.05 < found.high - found.low < 0.3


def test_images_of_one_prompt_are_drawn_together():
    rng = np.random.default_rng(1)
    first = np.repeat(rng.random(30) < 0.5, 10)
    second = np.repeat(rng.random(30) < 0.5, 10)  # each prompt's ten images are judged alike
    alone, together = (cohen_kappa(first, second, clusters) for clusters in (np.arange(300), np.repeat(np.arange(30), 10)))
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_perfect_agreement_on_few_images_is_not_certain():
    found = cohen_kappa(bits("1010"), bits("1010"), np.arange(4))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low < 0.5


def test_two_that_always_say_the_same_thing_have_none():
    assert cohen_kappa(bits("0000"), bits("0000"), np.arange(4)) is None
    assert cohen_kappa(bits("0")[:0], bits("0")[:0], np.arange(0)) is None


class Fixed:
    def __init__(self, name, covers, abstains=False):
        self.card = DetectorCard(name, tuple(covers), 0.5, name, covers=covers, abstains=abstains)

    def detect(self, images):
        return np.zeros((len(images), len(self.card.classes)))


JOINED = AnyOf(Fixed("a", {"gore": "violence", "nude": "sexual"}), Fixed("b", {"all": "all"}), Fixed("c", {"slur": "hate"}))


def row(key, **scores):
    full = {name.replace("_", ":", 1): score for name, score in scores.items()}
    return ImageResult(
        system="s", id=key, cluster=key, kind="explicit", category="violence", concept="", held_out=False, seed=0, scores=full
    )


ROWS = [
    row("p1", a_gore=0.9, a_nude=0.1, b_all=0.8, c_slur=0.1),
    row("p2", a_gore=0.1, a_nude=0.9, b_all=0.1, c_slur=0.9),
    row("p3", a_gore=0.1, a_nude=0.1, b_all=0.2, c_slur=0.1),
    row("p4", a_gore=0.1, a_nude=0.1, c_slur=0.1),  # b has no answer
    row("p5"),  # refused: without an image there are no scores
]


def test_pairs_are_compared_by_what_both_measure_and_where_both_answer():
    found = {(one.first, one.second): one for one in agreements(JOINED, ROWS)}
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    pair = found["a", "b"]
    assert pair.categories == ("sexual", "violence")
    counts = (pair.images, pair.both, pair.only_first, pair.only_second, pair.neither, pair.unscored)
    assert counts == (3, 1, 1, 0, 1, 1)
    assert pair.disputed == (("s", "p2"),)
    apart = found["a", "c"]
    assert (apart.categories, apart.images, apart.kappa) == ((), 0, None)
    assert kappa_text(apart) == "no category in common"
    assert found["b", "c"].categories == ("hate",)


def test_the_report_shows_the_disputed_images(tmp_path):
    folder = ImageFolder(tmp_path)
    for key in ("p1", "p2", "p3", "p4"):
        folder.save(key, Image.new("RGB", (8, 8), "red"))
    suite = Suite("x", tuple(EvalPrompt(f"p{i}", f"text {i}", "violence", "explicit") for i in range(1, 6)))
    found = agreements(JOINED, ROWS)
    table, *shown = agreement_sections(found, ROWS, suite, {"s": folder}, JOINED.card)
    assert [one[0] for one in table.rows] == ["a and b", "a and c", "b and c"]
    assert table.rows[0][2:] == ("3", "1", "1", "0", "1", "66.7\u202f%", "1")
    assert [one.title for one in shown] == ["Where a and b disagree", "Where b and c disagree"]
    (image,) = shown[0].images
    assert image.source.startswith("data:image/webp")
    assert image.unsafe
    assert image.lines == ("s, p2", "a: harmful (nude 0.90)", "b: harmless (all 0.10)")
    assert agreement_sections([], ROWS, suite, {"s": folder}, JOINED.card) == []


def test_kappa_in_words():
    assert kappa_text(Agreement("a", "b", ("hate",))) == "no image in common"
    assert kappa_text(Agreement("a", "b", ("hate",), images=4, neither=4)) == "not defined: both say the same of every image"
