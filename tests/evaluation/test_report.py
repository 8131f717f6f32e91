import base64
import io
import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from squares import make_suite, square
from valign.evaluation import report
from valign.evaluation.report.plots import HEIGHT, WIDTH, Frame, curves, pareto, place_labels, scatter, trade_offs
from valign.evaluation.report.plots import Point as PlotPoint
from valign.evaluation.report.report import chosen_benign, chosen_unsafe, data_uri, p_value, percent, points, signed

PAGES = Path(report.__file__).parent / "page"


def test_numbers_read_well():
    assert percent(0.0314) == "3.1\u202f%"
    assert points({"value": -0.958, "low": -0.98, "high": 0.0}) == "−95.8 [−98.0, 0.0]"
    assert signed(-0.001) == "0.00"
    assert p_value(0.0004) == "p\u202f<\u202f0.001"
    assert p_value(0.0456) == "p\u202f=\u202f0.046"


def test_images_are_chosen_by_order_not_by_looks():
    suite = make_suite()
    assert [prompt.id for prompt in chosen_unsafe(suite)][:3] == ["hate-explicit-0", "hate-explicit-held-0", "hate-paraphrased-0"]
    assert [prompt.id for prompt in chosen_benign(suite)] == [f"benign-{i}" for i in range(8)]


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.html")), ids=lambda page: page.stem)
def test_a_table_scrolls_by_itself_on_a_narrow_screen(page):
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"<table", text)) == len(re.findall(r'<div class="scroll">\s*<table', text))


def test_large_images_shrink_and_small_ones_lose_nothing():
    from PIL import Image

    def opened(image):
        return Image.open(io.BytesIO(base64.b64decode(data_uri(image).split(",")[1]))).convert("RGB")

    small, large = square((200, 10, 10), 3), square((200, 10, 10), 3, size=512)
    assert opened(small).tobytes() == small.tobytes()
    assert opened(large).size == (192, 192)
    assert large.size == (512, 512)
    assert data_uri(None) == ""


def test_labels_keep_clear_of_points_and_of_each_other():
    names = ["base", "negative-prompt", "sld-medium", "co-merge", "mean", "guarded"]
    centres = [(60.0, 40.0), (62.0, 42.0), (64.0, 44.0), (60.0, 46.0), (66.0, 40.0), (300.0, 40.0)]
    boxes = []
    for name, (x, y, anchor) in zip(names, place_labels(names, centres)):
        left = x if anchor == "left" else x - 6.6 * len(name)
        boxes.append((left, left + 6.6 * len(name), y - 9, y + 3))
    for i, a in enumerate(boxes):
        assert a[0] >= 0
        assert a[1] <= WIDTH
        assert not any(a[1] >= b[0] and a[0] <= b[1] and a[3] >= b[2] and a[2] <= b[3] for b in boxes[i + 1 :])


def test_points_lie_where_their_numbers_say():
    drawing = scatter(
        [PlotPoint("a<b", (0.0, 0.0, 10.0), (0.0, 0.0, 5.0)), PlotPoint("c", (90.0, 100.0, 100.0), (5.0, 10.0, 10.0))],
        Frame("x", "y", (0.0, 100.0), (0.0, 10.0)),
    )
    circles = [
        (float(x), float(y)) for x, y in re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: var', drawing)
    ]
    assert circles == [(58, HEIGHT - 40), (WIDTH - 16, 16)]
    assert "a&lt;b" in drawing


def test_a_plot_is_the_same_bytes_in_the_colours_of_the_page():
    def drawn():
        return scatter([PlotPoint("a", (1.0, 2.0, 3.0), (1.0, 2.0, 3.0))], Frame("x", "y", (0.0, 4.0), (0.0, 4.0)), front=[0])

    first = drawn()
    assert first == drawn()
    assert "http" not in first
    assert set(re.findall(r"var\(--(\w+)\)", first)) == {"s0", "faint", "soft", "line", "paper"}
    assert "#f" not in first


def test_curves_run_through_their_points_and_bear_their_names():
    drawing = curves({"a": [(0.0, 10.0), (50.0, 5.0)], "b&c": [(100.0, 0.0)]}, Frame("steps", "harm", (0.0, 100.0), (0.0, 10.0)))
    lines = re.findall(r'<path d="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n" style="fill: none; stroke: var\(--s0\)', drawing)
    assert [tuple(map(float, line)) for line in lines] == [(58, 16, (58 + WIDTH - 16) / 2, (16 + HEIGHT - 40) / 2)]
    assert ">a</text>" in drawing
    assert "b&amp;c" in drawing


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_pareto_optimal(pairs):
    points = [PlotPoint(str(n), (x, float(x), x), (y, float(y), y)) for n, (x, y) in enumerate(pairs)]
    front = sorted({pairs[place] for place in pareto(points)})
    unbeaten = {(x, y) for x, y in pairs if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in pairs)}
    assert front == sorted(unbeaten)  # the slow, obvious version


@pytest.mark.parametrize("fidelity", [True, False])
def test_a_suite_without_fidelity_still_has_a_plot(fidelity):
    share = {"value": 0.5, "low": 0.4, "high": 0.6}
    rate = {"share": share}
    system = {"name": "a", "ip": [{"category": "", "column": "all", "rate": rate}], "drift": None, "rmse": {"mean": share}}
    system["fidelity"] = {"everything asked": rate} if fidelity else {}
    assert len(trade_offs([system, {**system, "name": "b"}])) == 1 + fidelity
    shown = trade_offs([system, {**system, "name": "b", "counterpart": rate}])
    assert "Safe counterpart shown" in shown[fidelity].drawing
    assert trade_offs([{**system, "ip": []}]) == []
