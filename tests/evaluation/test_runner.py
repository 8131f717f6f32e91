"""The whole evaluation on coloured squares: what is counted is what was drawn, and a killed run ends as if it had not been."""

import json

import numpy as np
import pytest

from squares import chance, draw, square
from valign.checks import UserError
from valign.evaluation import EvalPrompt, Evaluators, Suite, System, evaluate
from valign.evaluation.report.report import cell
from valign.evaluation.results import read_results
from valign.interfaces import SamplingConfig


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One full evaluation, shared by the tests that only read it."""
    from squares import ColourClip, ColourReader, RedDetector, make_suite

    out = tmp_path_factory.mktemp("evaluation") / "run"
    systems = [
        System("base", draw(0.97), "as published"),
        System("sld-medium", draw(0.35, 0.1), "guided", extra_evaluations=1.0),
        System("guarded", draw(0.02, 0.0, 0.5), "behind a guard"),
    ]
    reference = [square((40, 90, 220), seed) for seed in range(15)]
    suite, evaluators = make_suite(), Evaluators(RedDetector(), ColourReader(), ColourClip(), reference=reference)
    summary = evaluate(systems, suite, evaluators, out=out)
    return out, suite, summary


def test_counts_are_what_the_systems_drew(done):
    out, suite, summary = done
    seeds = suite.seeds(0)
    drawn = sum(chance("harm", p.prompt, s) < 0.35 for p, s in zip(suite.prompts, seeds) if not p.benign)
    slips = sum(chance("slip", p.prompt, s) < 0.1 for p, s in zip(suite.prompts, seeds) if p.benign)
    sld, guarded = summary["systems"][1:]
    assert cell(sld, "", "all")["count"] == drawn
    assert sld["fidelity"]["colour"]["count"] == 20 - slips
    assert sld["fidelity"]["glyph"]["share"]["value"] == 1
    assert guarded["blocking"]["unsafe"]["count"] == sum(
        chance("refuse", p.prompt, s) < 0.5 for p, s in zip(suite.prompts, seeds) if not p.benign
    )
    rows = read_results(out / "results.parquet")
    assert len(rows) == 3 * len(suite)
    assert sum(row.harmful for row in rows if row.system == "sld-medium" and not row.benign) == drawn


def test_the_same_images_drift_by_nothing_and_others_do(done):
    _, _, summary = done
    base, sld, guarded = summary["systems"]
    assert base["drift"] is None
    assert guarded["drift"]["mean"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert sld["drift"]["mean"]["value"] > 0
    assert guarded["frechet"]["to_base"] == pytest.approx(0, abs=1e-6)
    assert sld["frechet"]["to_base"] > 0
    assert {system["frechet"]["count"] for system in summary["systems"]} == {15}  # cut to the reference
    assert sld["clip_score"]["mean"]["value"] < base["clip_score"]["mean"]["value"] == pytest.approx(30)


def test_every_rate_has_its_interval_correction_and_difference(done):
    out, _, summary = done
    saved = json.loads((out / "summary.json").read_text())
    assert saved["systems"] == json.loads(json.dumps(summary["systems"]))
    for system in saved["systems"]:
        for one in system["ip"]:
            rate = one["rate"]
            assert rate["share"]["low"] <= rate["share"]["value"] <= rate["share"]["high"]
            assert rate["corrected"] is not None
            assert (rate["versus"] is None) == (system["name"] == "base")
    assert saved["detector"]["sensitivity"] == 0.99
    assert saved["systems"][1]["extra_evaluations"] == 1
    assert saved["systems"][0]["seconds_per_image"] > 0


def test_the_report_needs_nothing_else_and_hides_nothing(done):
    out, suite, _ = done
    page = (out / "report.html").read_text()
    assert "data:image/webp;base64," in page
    assert not [link for link in ("http://", "https://", "<script", 'src="images') if link in page]
    assert "misses 1.00\u202f% of harmful images and flags 2.00\u202f% of harmless ones" in page
    assert page.count('<figure class="strip"') == 3 * 3 + 8
    assert suite.prompts[0].prompt in page  # a stand-in suite may be read
    assert "refused" in page


def test_real_harms_are_veiled_and_their_prompts_not_printed(tmp_path, systems, detector):
    suite = Suite("real", (EvalPrompt("a", "a wish for hate", "hate", "explicit"), EvalPrompt("b", "a green square")))
    summary = evaluate(systems[:1], suite, Evaluators(detector), out=tmp_path / "run", sampling=SamplingConfig(batch_size=1))
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'class="strips veiled"' in page
    assert "a wish for hate" not in page
    assert "a green square" in page
    assert summary["systems"][0]["frechet"] is None


def test_a_killed_run_goes_on_and_ends_the_same(done, tmp_path, suite, reader, clip, detector):
    calls = []

    def fragile(prompts, seeds):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(prompts))
        return draw(0.35, 0.1)(prompts, seeds)

    out = tmp_path / "run"
    evaluators = Evaluators(detector, reader, clip)
    base = System("base", draw(0.97), "as published")
    with pytest.raises(KeyboardInterrupt):
        evaluate([base, System("sld-medium", fragile, "guided")], suite, evaluators, out=out)
    assert len(list((out / "images" / "sld-medium").glob("*.png"))) == 48
    (out / "images" / "sld-medium" / f"{suite.prompts[47].id}.png").unlink()  # as if killed within the third batch

    again = []

    def sound(prompts, seeds):
        again.append(len(prompts))
        return draw(0.35, 0.1)(prompts, seeds)

    def never(prompts, seeds):
        raise AssertionError("drawn twice")

    resumed = evaluate([System("base", never, "as published"), System("sld-medium", sound, "guided")], suite, evaluators, out=out)
    assert again == [16, 16, 4]  # of 5 batches, two were whole
    for kind in ("ip", "fidelity", "drift", "rmse"):
        assert json.dumps(resumed["systems"][1][kind]) == json.dumps(json.loads(json.dumps(done[2]["systems"][1][kind])))

    finished = evaluate([System("base", never, "as published"), System("sld-medium", never, "guided")], suite, evaluators, out=out)
    assert finished == json.loads((out / "summary.json").read_text())


def test_a_system_may_join_later_and_only_it_is_drawn(tmp_path, suite, detector):
    drawn = []

    def counted(name):
        def generate(prompts, seeds):
            drawn.append(name)
            return draw(0.5)(prompts, seeds)

        return System(name, generate)

    evaluate([counted("base")], suite, Evaluators(detector), out=tmp_path / "run", sampling=SamplingConfig(batch_size=200))
    summary = evaluate(
        [counted("base"), counted("new")],
        suite,
        Evaluators(detector),
        out=tmp_path / "run",
        sampling=SamplingConfig(batch_size=200),
    )
    assert drawn == ["base", "new"]
    assert [system["name"] for system in summary["systems"]] == ["base", "new"]


def test_images_of_another_system_or_suite_are_never_mixed(tmp_path, suite, detector):
    out = tmp_path / "run"
    evaluate([System("base", draw(0.5), fingerprint="one")], suite, Evaluators(detector), out=out)
    with pytest.raises(UserError, match="was made with another recipe"):
        evaluate([System("base", draw(0.5), fingerprint="two")], suite, Evaluators(detector), out=out)
    with pytest.raises(UserError, match="was made with another inputs"):
        evaluate([System("base", draw(0.5), fingerprint="one")], suite.take(5), Evaluators(detector), out=out)


def test_the_named_base_comes_first(tmp_path, suite, detector):
    listed = {name: System(name, draw(0.5)) for name in ("one", "two")}
    summary = evaluate(listed, suite.take(6), Evaluators(detector), base="two", out=tmp_path / "run")
    assert [system["name"] for system in summary["systems"]] == ["two", "one"]


@pytest.mark.parametrize(
    ("systems", "message"),
    [
        ([], "at least one; got none"),
        ([System("a", draw(0)), System("a", draw(1))], "distinct names, at least one; got a, a"),
        ([System("a", lambda prompts, seeds: [])], "System a must give one image"),
    ],
)
def test_bad_systems_are_refused(tmp_path, suite, detector, systems, message):
    with pytest.raises(ValueError, match=message):
        evaluate(systems, suite, Evaluators(detector), out=tmp_path / "run")


def test_a_system_name_that_is_no_file_name_is_refused():
    with pytest.raises(UserError, match=r"System name must be letters.*got '\.\./up'"):
        System("../up", draw(0))


def test_notes_warn_of_an_unmeasured_detector_and_few_images(tmp_path, suite, systems, reader):
    from dataclasses import replace

    from squares import RedDetector

    detector = RedDetector()
    detector.card = replace(detector.card, sensitivity=None)
    summary = evaluate(systems[:2], suite, Evaluators(detector, reader), out=tmp_path / "run")
    text = " ".join(summary["notes"])
    assert "was never measured" in text
    assert "rank-deficient" in text
    assert np.all([one["rate"]["corrected"] is None for one in summary["systems"][0]["ip"]])
