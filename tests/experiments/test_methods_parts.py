"""The parts of the comparison of methods, by hand: bias of drawn roles, mean curves, harm by run, tables."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from valign.checks import UserError
from valign.data.prompts.pairs import PromptPair, write_pairs
from valign.detectors.oracle import OracleDetector, SceneReading
from valign.evaluation.results import ImageResult
from valign.evaluation.suite import EvalPrompt, Suite
from valign.evaluation.systems import System
from valign.experiments.methods import bench as bench_methods
from valign.experiments.methods.bench import cost_section, harm_by_run, refuse_trained, run_section
from valign.experiments.methods.bias import bias_section, role_bias
from valign.experiments.methods.curves import CurvePoint, curves_section, mean_curve
from valign.experiments.methods.trained import Made, methods_config
from valign.interfaces import SamplingConfig
from valign.worlds.shapes.vocabulary import HEADS
from valign.worlds.shapes.world import SHAPES

SAMPLING = SamplingConfig(steps=1, guidance_scale=1.0, batch_size=4)
GREY = {0: 10, 1: 200, -1: 90}  # an image's grey says which head it shows


class Reader(OracleDetector):
    def __init__(self):
        pass

    def read(self, images):
        shown = {grey: head for head, grey in GREY.items()}
        heads = [shown[image.convert("L").getpixel((0, 0))] for image in images]
        return [SceneReading((() if head < 0 else (("left", f"{HEADS[head]} clerk", "red"),)), "paper", "flat") for head in heads]


def drawing(name, heads):
    """A system that shows these heads one after the other; None is a refusal."""
    order = iter(heads)

    def generate(prompts, seeds):
        made = [next(order) for _ in prompts]
        return [None if head is None else Image.new("RGB", (4, 4), (GREY[head],) * 3) for head in made]

    return System(name, generate, fingerprint=name)


def test_bias_counts_heads_by_prompt_against_the_first_system(tmp_path):
    prompts = [EvalPrompt(f"r0-{role}-0-{n}", f"a {role}") for role in ("captain", "clerk") for n in range(4)]
    suite = Suite("roles", tuple(prompts))
    systems = [
        drawing("base", [1, 1, 1, 1, 0, 0, 0, 0]),
        drawing("even", [1, 0, 1, 0, 0, 1, 0, 1]),
        drawing("odd", [1, -1, None, 0, 0, 0, 0, 1]),
        drawing("blank", [-1] * 8),
    ]
    base, even, odd, blank = role_bias(systems, suite, Reader(), tmp_path, SAMPLING)
    assert (base.bias.d1, base.readable, base.versus) == (1, 1, None)
    assert (even.bias.d1, even.versus.value) == (0, -1)
    assert odd.bias.d1 == pytest.approx((0 + 2 / 4) / 2)  # one of two each; three of four
    assert odd.readable == 6 / 8
    assert (blank.bias, blank.d1, blank.readable) == (None, None, 0)
    table = bias_section([base, even, odd, blank])
    assert [row[0] for row in table.rows] == ["base", "even", "odd", "blank"]
    assert table.rows[0][1].startswith("1.00")
    assert table.rows[1][2].startswith("-1.00")
    assert table.rows[3][1:4] == ("–", "–", "–")
    assert all(len(row) == 1 + len(table.header) for row in table.rows)


def test_a_mean_curve_goes_as_far_as_all_runs_do():
    runs = [[CurvePoint(10, 1.0, 80.0), CurvePoint(20, 2.0, 40.0)], [CurvePoint(10, 3.0, 60.0)]]
    assert mean_curve(runs, start=100.0) == [CurvePoint(0, 0.0, 100.0), CurvePoint(10, 2.0, 70.0)]
    drawn = curves_section({"a": mean_curve(runs, 100.0), "b": [CurvePoint(0, 0.0, 100.0), CurvePoint(5, 8.0, 50.0)]})
    assert len(drawn.plots) == 2
    assert drawn.rows[0] == ("a", "100 % at 0 → 70 % at 10")


def test_harm_is_split_by_the_run_that_drew():
    def row(seed, kind, **found):
        category = "" if kind == "benign" else "hate"
        plain = {"cluster": str(seed), "concept": "", "held_out": False}
        return ImageResult(system="s", id=str(seed), kind=kind, category=category, seed=seed, **plain, **found)

    rows = [
        row(0, "explicit", harmful=True),
        row(2, "explicit"),
        row(1, "explicit"),
        row(4, "benign", fidelity={"glyph": True, "colour": False}),
        row(3, "benign", fidelity={"glyph": True}),
        row(5, "benign", blocked=True),
    ]
    first = {"harm": 50.0, "explicit": 50.0, "benign": 0.0}
    assert harm_by_run(rows, 2) == {"s": [first, {"harm": 0.0, "explicit": 0.0, "benign": 50.0}]}


def test_explicit_held_out_and_composed_are_reported_apart_for_every_run():
    def row(seed, kind, held_out, harmful):
        return ImageResult(
            system="s",
            id=str(seed),
            cluster=str(seed),
            kind=kind,
            category="hate",
            concept="",
            held_out=held_out,
            seed=seed,
            harmful=harmful,
        )

    rows = [row(0, "explicit", False, True), row(1, "explicit", True, False), row(2, "composed", False, True)]
    rows += [ImageResult(system="s", id="b", cluster="b", kind="benign", category="", concept="", held_out=False, seed=3)]
    rows[-1] = replace(rows[-1], fidelity={"glyph": False})
    (found,) = harm_by_run(rows, 1)["s"]
    assert {name: found[name] for name in ("explicit", "held-out", "composed")} == {
        "explicit": 100.0,
        "held-out": 0.0,
        "composed": 100.0,
    }
    section = run_section({"s": [found]})
    assert "all unsafe prompts / explicit / held-out / composed / benign prompts done right" in section.text
    assert section.rows == (("s", "66.7 / 100.0 / 0.0 / 100.0 / 0.0"),)


def test_what_nobody_can_read_is_not_reported_as_wrong():
    row = ImageResult(system="s", id="b", cluster="b", kind="benign", category="", concept="", held_out=False, seed=0)
    harm = ImageResult(
        system="s", id="a", cluster="a", kind="explicit", category="x", concept="", held_out=False, seed=0, harmful=True
    )
    (found,) = harm_by_run([row, harm], 1)["s"]
    assert "benign" not in found
    assert run_section({"s": [found]}).note == "Harmful images. Held-out concepts are in no kind."


def test_costs_are_means_with_their_range(tmp_path):
    runs = [{"livo": Made(tmp_path, 1234567, 100, 2.0)}, {"livo": Made(tmp_path, 1234567, 80, 4.0)}]
    assert cost_section(runs).rows == (("livo", "1,234,567", "100, 80", "3.0 (2.0–4.0)"),)


def test_a_run_must_not_be_tested_on_what_it_trained_on(tmp_path, monkeypatch):
    values = SimpleNamespace(prompts=("a tree",))
    monkeypatch.setattr(bench_methods, "open_values", lambda folder: {tmp_path / "values": values}[folder])
    (tmp_path / "data" / "prompts").mkdir(parents=True)
    pair = PromptPair("a", "a blue cup", "a red star", ("hate",))
    write_pairs(tmp_path / "data" / "prompts" / "pairs.parquet", [pair])
    config = methods_config(SHAPES, "small")

    def refuse(prompt):
        refuse_trained(Suite("words", (EvalPrompt("p0", prompt),), stand_in=True), tmp_path, config)

    refuse("a green hat")
    for prompt in (pair.unsafe, pair.safe, "a tree"):
        with pytest.raises(UserError, match=r"got 1 of 1: p0"):
            refuse(prompt)
