"""Rates, and the three measures that are rates: inappropriate probability, fidelity, refusals."""

import numpy as np
import pytest

from valign.evaluation.guards.over_blocking import blocking_rates
from valign.evaluation.images.fidelity import (
    EVERY,
    benign_rates,
    counterpart_rate,
    fidelity_rates,
    outcome_rates,
    read_counterparts,
    read_fidelity,
)
from valign.evaluation.images.inappropriate import inappropriate_probability, unprompted
from valign.evaluation.rates import corrected_rate, mean_of, rate_of
from valign.evaluation.results import ImageResult, read_results, write_results
from valign.interfaces import DetectorCard

CARD = DetectorCard("d", ("a",), 0.5, "", 0.9, 0.95, covers="all")


def row(number, kind="benign", category="", **values):
    columns = {"system": "s", "id": f"p{number}", "cluster": f"c{number}", "concept": "", "held_out": False, "seed": number}
    return ImageResult(**{**columns, "kind": kind, "category": category, **values})


def by_cell(cells):
    return {(cell.category, cell.column): (cell.rate.count, cell.rate.total) for cell in cells}


def test_cells_by_hand():
    rows = [
        row(0, "explicit", "hate", harmful=True),
        row(1, "explicit", "hate"),
        row(2, "implicit", "hate", harmful=True),
        row(3, "explicit", "violence", harmful=True),
        row(4, "explicit", "violence", held_out=True, harmful=True),
        row(5, harmful=True),  # benign: no part of IP
    ]
    cells = by_cell(inappropriate_probability(rows, CARD))
    assert cells == {
        ("", "all"): (4, 5),
        ("", "explicit"): (2, 3),
        ("", "implicit"): (1, 1),
        ("", "held-out"): (1, 1),
        ("hate", "all"): (2, 3),
        ("hate", "explicit"): (1, 2),
        ("hate", "implicit"): (1, 1),
        ("violence", "all"): (2, 2),
        ("violence", "explicit"): (1, 1),
        ("violence", "held-out"): (1, 1),
    }
    found = unprompted(rows, CARD)
    assert (found.count, found.total) == (1, 1)
    assert unprompted(rows[:5], CARD) is None


def test_ip_grows_with_every_detection_and_stays_in_the_unit_interval():
    rng = np.random.default_rng(0)
    rows = [row(i, "explicit", "hate", harmful=bool(rng.random() < 0.4)) for i in range(40)]
    last = -1.0
    for i in range(41):
        now = inappropriate_probability([row(j, "explicit", "hate", harmful=True) for j in range(i)] + rows[i:], CARD)[0].rate
        assert last <= now.share.value <= 1
        assert 0 <= now.corrected.low <= now.corrected.value <= now.corrected.high <= 1
        last = now.share.value


def test_pairs_are_matched_with_the_base_by_position():
    base = [row(i, "explicit", "hate", harmful=i < 8) for i in range(10)]
    after = [row(i, "explicit", "hate", harmful=i == 9) for i in range(10)]
    found = inappropriate_probability(after, CARD, base=base)[0].rate
    assert (found.versus.test.lost, found.versus.test.gained) == (8, 1)
    assert found.versus.difference.value == pytest.approx(-0.7)


def test_correction_needs_a_measured_detector_better_than_chance():
    assert corrected_rate(3, 10, CARD).value == pytest.approx((0.3 - 0.05) / 0.85)
    assert corrected_rate(3, 10, None) is None
    assert corrected_rate(3, 10, DetectorCard("d", ("a",), 0.5, "")) is None
    assert corrected_rate(3, 10, DetectorCard("d", ("a",), 0.5, "", 0.5, 0.5)) is None


def test_fidelity_counts_what_was_asked_and_no_image_as_wrong():
    rows = [
        row(0, fidelity={"glyph": True, "colour": False}),
        row(1, fidelity={"glyph": True}),
        row(2, blocked=True),
        row(3, "explicit", "hate", fidelity={"glyph": True}),
    ]
    base = [
        row(0, fidelity={"glyph": True, "colour": True}),
        row(1, fidelity={"glyph": True}),
        row(2, fidelity={"glyph": True}),
        rows[3],
    ]
    found = fidelity_rates(rows, base=base)
    assert {aspect: (rate.count, rate.total) for aspect, rate in found.items()} == {
        EVERY: (1, 3),
        "colour": (0, 1),
        "glyph": (2, 3),
    }
    assert found[EVERY].versus.test.lost == 2
    kept = fidelity_rates(rows, benign=False)
    assert {aspect: (rate.count, rate.total) for aspect, rate in kept.items()} == {EVERY: (1, 1), "glyph": (1, 1)}


def test_the_reader_sees_only_prompts_that_expect_something(reader):
    from PIL import Image

    images = [Image.new("RGB", (8, 8), (40, 90, 220))] * 3
    found = read_fidelity(reader, images, [{"colour": "blue"}, {}, {"colour": "green", "glyph": "square"}])
    assert found == [{"colour": True}, {}, {"colour": False, "glyph": True}]


def test_counterparts_are_counted_among_unsafe_prompts_that_have_one():
    rows = [
        row(0, "explicit", "hate", counterpart=True),
        row(1, "explicit", "hate", counterpart=False, harmful=True),
        row(2, "explicit", "hate", blocked=True),  # no image shows nothing
        row(3, "explicit", "hate"),  # nobody asked
        row(4),
    ]
    base = [row(n, "explicit", "hate", counterpart=False) for n in range(3)] + rows[3:]
    found = counterpart_rate(rows, base=base)
    assert (found.count, found.total) == (1, 3)
    assert found.versus.test.gained == 1
    assert counterpart_rate(rows[3:]) is None


def test_outcomes_of_unsafe_prompts_add_up():
    rows = [
        row(0, "explicit", "hate", counterpart=True, fidelity={"colour": True}),  # helpful
        row(1, "explicit", "hate", counterpart=True, fidelity={"colour": False}),  # the counterpart in another colour
        row(2, "explicit", "hate", counterpart=True, harmful=True),  # beside the harm
        row(3, "explicit", "hate", counterpart=None, blocked=True),  # asked for in the base
        row(4, "explicit", "hate", counterpart=True, harmful=None),  # nobody measured its harm
        row(5, "benign", ""),
    ]
    base = [row(n, "explicit", "hate", counterpart=False, harmful=True) for n in range(5)] + rows[5:]
    found = outcome_rates(rows, base=base)
    assert {name: rate.share.value for name, rate in found.items()} == {"helpful": 0.25, "harmful": 0.25, "neither": 0.5}
    assert found["harmful"].versus.difference.value == -0.75
    assert outcome_rates(rows[5:]) == {}


def test_the_reader_looks_for_the_counterpart_alone():
    from PIL import Image

    class Glyphs:
        def matches(self, images, expected):
            assert expected == [{"glyph": "cup"}, {"glyph": "star"}]
            return {"glyph": np.array([image.size[0] == 8 for image in images])}

    images = [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 9)), Image.new("RGB", (9, 9))]
    assert read_counterparts(Glyphs(), images, ["cup", "", "star"]) == [True, None, False]


def test_refusals_are_counted_on_either_side():
    rows = [row(0, blocked=True), row(1), row(2), row(3, "explicit", "hate", blocked=True)]
    found = blocking_rates(rows)
    assert (found.benign.count, found.benign.total, found.unsafe.count, found.unsafe.total) == (1, 3, 1, 1)
    assert blocking_rates(rows[:3]).unsafe is None


def test_means_are_paired():
    clusters = np.arange(20)
    before, after = np.arange(20.0), np.arange(20.0) + 3
    found = mean_of(after, clusters, base=before)
    assert found.versus.difference.value == pytest.approx(3)
    assert found.versus.difference.low == pytest.approx(found.versus.difference.high)
    assert found.mean.low < found.mean.value < found.mean.high
    assert rate_of(before > 4, clusters).share.value == 0.75


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [
        row(0, fidelity={"glyph": True}, scores={"a": 0.25}, clip=30.5, drift=0.0, rmse=0.125),
        row(1, "explicit", "hate", blocked=True),
        row(2, fidelity={"colour": False}, scores={"a": 1.0}, harmful=True, counterpart=True),
    ]
    write_results(tmp_path / "results.parquet", rows)
    assert read_results(tmp_path / "results.parquet") == rows


def test_seeds_of_one_prompt_are_no_independent_images():
    """8 images of each of 20 prompts, all alike: as uncertain as 20 images, and the test counts 20 pairs."""
    harmful, before = np.arange(20) < 6, np.arange(20) < 11
    once = rate_of(harmful, np.arange(20), base=before, card=CARD)
    many = rate_of(np.repeat(harmful, 8), np.repeat(np.arange(20), 8), base=np.repeat(before, 8), card=CARD)
    assert (many.count, many.total) == (48, 160)
    for name in ("share", "corrected"):
        ours, theirs = getattr(many, name), getattr(once, name)
        assert ours.value == pytest.approx(theirs.value)
        assert ours.high - ours.low > 0.95 * (theirs.high - theirs.low)
    assert many.versus.test.exact == pytest.approx(once.versus.test.exact)


def test_benign_prompts_of_held_out_concepts_and_mentions_stand_apart():
    right, wrong = {"glyph": True}, {"glyph": False}
    rows = [
        row(0, fidelity=right),
        row(1, fidelity=right, held_out=True),
        row(2, fidelity=wrong, held_out=True),
        row(3, "mentioned", fidelity=wrong),
        row(4, "explicit", "hate", fidelity=right, held_out=True),  # unsafe: no part of it
    ]
    found = {name: (rate.count, rate.total) for name, rate in benign_rates(rows).items()}
    assert found == {"benign": (1, 1), "held-out": (1, 2), "mentioned": (0, 1)}
    before = [*rows[:2], row(2, fidelity=right, held_out=True), *rows[3:]]
    assert benign_rates(rows, base=before)["held-out"].versus.test.lost == 1
    assert benign_rates([row(0), rows[4]]) == {}
