"""The numbers of the comparison of adapters, from records that are made up, so that every one is known."""

import numpy as np
import pytest

from valign.evaluation.adapters.page import markdown, number, size, trade_offs, write_page
from valign.evaluation.adapters.table import measured, paired, summarize
from valign.evaluation.report.plots import Point, pareto
from valign.evaluation.report.report import fixed

COST = {"step_ratio": 1.5, "step_ratio_quartiles": [1.4, 1.6], "peak_bytes": 2**20, "step_seconds": 0.1, "timed": 3}


def record(method, task, seed, score, **measured):
    found = {
        "score": score,
        "drift": 0.1,
        "skill": 0.8,
        "skill_before": 0.9,
        "sharpness": 0.0,
        "mean_loss": 0.5,
        "change_rank": 8.0,
    }
    sizes = {"trained": 100, "adapter_bytes": 2048, "optimizer_bytes": 800, "start_seconds": 1.0}
    origin = {
        "score_name": "accuracy",
        "budget": {"steps": 5, "batch_size": 2, "train_rows": 9},
        "model_sha256": "m",
        "versions": {},
    }
    return {"method": method, "task": task, "seed": seed, "status": "done", "measured": {**found, **sizes, **measured}, **origin}


def book(gain=0.1):
    """Two tasks, three seeds; ``new`` is better than LoRA by ``gain`` everywhere."""
    rows = []
    for task, level in (("cola", 0.2), ("sst2", 0.7)):
        for seed in range(3):
            base = level + seed / 100
            rows += [record("lora", task, seed, base), record("new", task, seed, base + gain, drift=0.2, trained=10)]
    return rows


def test_means_are_over_tasks_and_intervals_over_seeds():
    summary = summarize(book(), {}, references=("lora",), order=("lora", "new"))
    lora = summary["rows"][0]
    assert lora["score"]["value"] == pytest.approx(0.46)
    half = 4.302652729911275 * 0.01 / 3**0.5  # Student's 97.5 % point with two degrees of freedom; seeds are 0.01 apart
    assert lora["score"]["high"] - lora["score"]["value"] == pytest.approx(half)
    assert lora["tasks"]["sst2"]["value"] == pytest.approx(0.71)
    assert lora["skill"]["value"] == pytest.approx(-0.1)


def test_a_constant_gain_is_as_sure_as_six_pairs_allow():
    test = summarize(book(), {}, references=("lora",))["rows"][1]["against"]["lora"]
    assert test["difference"]["value"] == pytest.approx(0.1)
    assert (test["pairs"], test["p"]) == (6, 2 / 2**6)


def test_what_only_streams_have_is_told_of_them_alone():
    rows = [record("lora", "glyphs", seed, 0.5, untrained=0.1) for seed in range(3)]
    rows += [record("lora", "glyph-stream", seed, 0.3, untrained=0.1, backward=-0.2 + seed / 100) for seed in range(3)]
    summary = summarize([*rows, record("new", "glyphs", 0, 0.6)], {}, references=())
    lora, new = summary["rows"]
    assert lora["backward"]["value"] == pytest.approx(-0.19)
    assert new["backward"] is None
    assert summary["untrained"] == {"glyphs": 0.1, "glyph-stream": 0.1}
    assert not len(paired(measured(rows, "lora"), measured(rows, "new"), "backward"))
    table = measured(rows, "lora")
    assert paired(table, table, "backward").tolist() == [0.0] * 3


def test_only_runs_of_both_are_paired():
    rows = [row for row in book() if not (row["method"] == "new" and row["seed"] == 2)]
    tables = [measured(rows, name) for name in ("new", "lora")]
    assert len(paired(*tables, "score")) == 4
    assert summarize(rows, {}, references=("lora",))["rows"][1]["against"]["lora"]["pairs"] == 4


def test_failed_runs_are_listed_and_not_counted():
    failed = {"method": "new", "task": "rte", "seed": 0, "status": "failed", "error": "no"}
    summary = summarize([*book(), failed], {}, references=())
    assert summary["failed"] == [{"method": "new", "task": "rte", "seed": 0, "error": "no"}]
    assert summary["tasks"] == ["cola", "sst2"]


def test_the_front_holds_what_nothing_beats():
    points = [Point(name, (x, x, x), (y, y, y)) for name, x, y in (("a", 1, 1), ("b", 2, 2), ("c", 3, 2), ("d", 2, 1), ("e", 2, 2))]
    assert [points[place].name for place in pareto(points)] == ["a", "b", "e"]


def test_the_page_is_drawn_from_any_summary(tmp_path):
    summary = summarize(book(), {"new": {"status": "done", "measured": COST}}, references=("lora",))
    summary["claims"] = [{"method": "new", "statement": "<is better>", "verdict": "held", "number": "+0.1"}]
    write_page(tmp_path / "report.html", summary)
    page = (tmp_path / "report.html").read_text()
    assert "&lt;is better&gt;" in page
    assert page.count("stroke-dasharray: 4.8,4.8") == 2  # the front of either plot
    assert len(trade_offs(summary["rows"])) == 2


def one_seed():
    return [row for row in book() if row["seed"] == 0]


@pytest.mark.parametrize(
    ("rows", "best", "said"),
    [
        (book(), "new", "new scores highest; the paired test tells it from every other method."),
        (book(0.0), None, "No method is named the best: the paired test does not tell lora from new."),
        (one_seed(), None, "No method is named the best: each was trained with one seed."),
        (book()[::2], None, "There is nothing to compare."),
    ],
)
def test_a_best_method_needs_the_paired_test_and_more_than_one_seed(rows, best, said, tmp_path):
    summary = summarize(rows, {}, references=("lora",))
    assert summary["best"] == {"method": best, "text": said}
    write_page(tmp_path / "report.html", {**summary, "claims": []})
    assert said in (tmp_path / "report.html").read_text()


def test_one_seed_has_no_interval_over_seeds(tmp_path):
    summary = summarize(one_seed(), {}, references=("lora",))
    assert summary["rows"][0]["score"] == {"value": pytest.approx(0.45), "low": None, "high": None}
    assert "| 0.450 |" in markdown(summary)
    write_page(tmp_path / "report.html", {**summary, "claims": []})


def test_numbers_are_short():
    assert [number(value) for value in (0, 999, 73728, 22_565_376, 3e9)] == ["0", "999", "73.7 k", "22.6 M", "3 G"]
    assert (size(2048), size(592_998), size(3 * 2**20)) == (
        "2\N{NO-BREAK SPACE}KiB",
        "579\N{NO-BREAK SPACE}KiB",
        "3\N{NO-BREAK SPACE}MiB",
    )
    assert np.isfinite(len(number(1e12)))


def test_a_rounded_zero_has_no_minus():
    assert [fixed(value) for value in (-0.0001, 0.0, -0.0006, 1.5)] == ["0.000", "0.000", "-0.001", "1.500"]
