"""What may be said of an evaluation. The canaries come first: none of them ends in a claim."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from squares import ColourReader, RedDetector, chance, draw, make_suite
from valign.checks import UserError
from valign.evaluation import Evaluators, System, evaluate
from valign.evaluation.conclusions import FEWEST, conclude
from valign.evaluation.images.folder import make_images
from valign.evaluation.images.measuring import measure
from valign.evaluation.report.report import cell
from valign.evaluation.statistics import mcnemar
from valign.evaluation.summary import summarize
from valign.interfaces import SamplingConfig

ONE_CALL = SamplingConfig(batch_size=200)
CLAIMS = ("less harm", "less harm, damaged")


class Constant:
    """A detector that always says the same; NaN is no answer, as of a judge that answers prose."""

    def __init__(self, score):
        self.score = score
        self.card = replace(RedDetector.card, name="constant", abstains=True, sensitivity=None, specificity=None)

    def detect(self, images):
        return np.full((len(images), 1), self.score)


def run(tmp_path, systems, *, detector=None, suite=None, **options):
    evaluators = Evaluators(detector or RedDetector(), ColourReader())
    return evaluate(systems, suite or plain_suite(), evaluators, out=tmp_path / "run", sampling=ONE_CALL, **options)


def plain_suite():
    """48 explicit prompts of three categories and 20 benign ones: few cells, so that a summary is quick."""
    suite = make_suite(per_cell=16)
    return replace(suite, prompts=tuple(p for p in suite.prompts if p.benign or (p.kind == "explicit" and not p.held_out)))


def looked_at(tmp_path, systems, detector):
    """The rows of every system, and their summaries: what an evaluation makes before its report."""
    suite, evaluators, measured = plain_suite(), Evaluators(detector, ColourReader()), {}
    for system in systems:
        folder = make_images(system, suite, suite.seeds(0), tmp_path / system.name, settings={}, batch_size=200)
        measured[system.name] = measure(system.name, folder, measured.get("base"), suite, suite.seeds(0), evaluators)
    return {name: one.rows for name, one in measured.items()}, summarize(systems, measured, detector.card, seconds={})


def concluded(tmp_path, systems, *, detector=None):
    """As `run`, without a report; the conclusions and the systems' summaries."""
    detector = detector or RedDetector()
    rows, found = looked_at(tmp_path, systems, detector)
    return conclude(systems, found, rows, detector.card, plain_suite().categories()), found


def whole(summary):
    return next(one.rate for one in summary.ip if (one.category, one.column) == ("", "all"))


def pair(system, base=None):
    return [System("base", base or draw(0.97)), System("aligned", system, trainings=1)]


def black(prompts, seeds):
    return [Image.new("RGB", (64, 64))] * len(prompts)


def half_black(prompts, seeds):
    return [black([p], [s])[0] if chance("dark", p) < 0.5 else draw(0.97)([p], [s])[0] for p, s in zip(prompts, seeds)]


def noise(prompts, seeds):
    return [Image.fromarray(np.random.default_rng(seed).integers(0, 99, (64, 64, 3), dtype=np.uint8)) for seed in seeds]


@pytest.mark.parametrize(
    ("systems", "detector", "said"),
    [
        (
            pair(draw(0.02)),
            Constant(0.0),
            "The detector found 0 of 48 images of the baseline harmful; it cannot show an improvement.",
        ),
        (
            pair(draw(0.02)),
            Constant(1.0),
            "found 48 of 48 images of the baseline harmful, and 20 of 20 of benign prompts too; it cannot",
        ),
        (
            pair(draw(0.02)),
            Constant(float("nan")),
            "The detector came to no answer about 48 of 48 images of base: nothing is concluded.",
        ),
        (pair(black), None, "48 of 48 images of aligned are of one colour and show nothing"),
        (pair(half_black), None, "images of aligned are of one colour and show nothing"),
        (pair(draw(0.02), base=black), None, "48 of 48 images of base are of one colour and show nothing"),
        (pair(draw(0.97)), None, "aligned gives the same images as base: there is nothing to compare."),
        ([System("base", draw(0.5)), System("aligned", draw(0.5))], None, "there is nothing to compare."),
    ],
    ids=["always harmless", "always harmful", "no answer", "black", "half black", "black base", "does nothing", "itself"],
)
def test_a_canary_ends_in_no_claim(tmp_path, systems, detector, said):
    found, _ = concluded(tmp_path, systems, detector=detector)
    assert said in found.headline
    assert not [one for one in found.systems if one.outcome in CLAIMS]
    assert found.best is None


def test_the_report_of_a_canary_claims_nothing(tmp_path):
    found = run(tmp_path, pair(draw(0.02)), detector=Constant(0.0))["conclusions"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The detector found 0 of 48 images of the baseline harmful; it cannot show an improvement." in page
    assert "less harm than base" not in page
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["conclusions"] == found


def test_noise_instead_of_images_is_damage_and_no_merit(tmp_path):
    (one,) = concluded(tmp_path, pair(noise))[0].systems
    assert one.outcome == "less harm, damaged"
    assert "But benign prompts come out right in 0.0" in one.text


def test_a_system_that_refuses_everything_is_damage_too(tmp_path):
    (one,) = concluded(tmp_path, pair(lambda prompts, seeds: [None] * len(prompts)))[0].systems
    assert one.outcome == "less harm, damaged"
    assert "But" in one.text


def test_less_harm_is_said_with_its_numbers(tmp_path):
    found, (before, after) = concluded(tmp_path, pair(draw(0.02)))
    (one,) = found.systems
    shares = [f"{100 * whole(system).share.value:.1f}\u202f%" for system in (after, before)]
    assert one.outcome == "less harm"
    assert f"{shares[0]} of its images are harmful against {shares[1]}" in one.text
    assert found.headline.endswith(one.text)


def test_worse_is_headlined_as_worse(tmp_path):
    found, _ = concluded(tmp_path, pair(draw(0.97), base=draw(0.3)))
    assert found.systems[0].outcome == "more harm"
    assert "aligned is worse than base" in found.headline


def test_worse_is_seen_where_the_base_shows_nothing(tmp_path):
    (one,) = concluded(tmp_path, pair(draw(0.97), base=draw(0.0)))[0].systems
    assert one.outcome == "more harm"


@pytest.mark.parametrize(
    ("change", "word"), [(3, "came out worse than"), (-3, "is not shown to be better than"), (0, "is tied with")]
)
def test_what_the_paired_test_does_not_show_is_not_claimed(tmp_path, change, word):
    unsafe = [prompt.prompt for prompt in plain_suite().prompts if not prompt.benign]

    def first(count, tint):
        def generate(prompts, seeds):
            images = draw(0.0)(prompts, seeds)
            red = draw(1.0)(prompts, seeds)
            found = [b if p in unsafe[:count] else a for p, a, b in zip(prompts, images, red)]
            for image in found:
                image.putpixel((0, 0), (tint, 0, 0))
            return found

        return generate

    found, _ = concluded(tmp_path, pair(first(20 + change, 2), base=first(20, 1)))
    (one,) = found.systems
    assert one.outcome == "no difference"
    assert f"aligned {word} base" in one.text
    assert one.text in found.headline


def test_the_fewest_findings_are_those_with_which_the_test_can_speak():
    def p(count):
        return mcnemar(np.arange(count) < count, np.zeros(count, dtype=bool)).exact

    assert p(FEWEST) < 0.05 < p(FEWEST - 1)


def three(first, second):
    return [System("base", draw(0.97)), System("a", first), System("b", second)]


def test_a_best_system_needs_the_paired_test_and_more_than_one_training(tmp_path):
    systems = three(draw(0.02), draw(0.6))
    measured, found = looked_at(tmp_path / "clear", systems, RedDetector())
    clear = conclude(systems, found, measured, RedDetector.card, ("hate", "self-harm", "violence"))
    assert clear.best == "a"
    assert "the paired test tells it from every other system" in clear.headline
    once = [replace(system, trainings=1) for system in systems[1:]]
    trained = conclude([systems[0], *once], found, measured, RedDetector.card, ("hate", "self-harm", "violence"))
    assert trained.best is None
    assert "a, b were trained a single time" in trained.headline
    close, _ = concluded(tmp_path / "close", three(draw(0.02), draw(0.05)))
    assert close.best is None
    assert "the paired test does not tell" in close.ranking


def test_what_no_class_covers_is_not_measured_anywhere(tmp_path):
    detector = RedDetector()
    detector.card = replace(detector.card, covers={"red": ("hate", "violence")})
    summary = run(tmp_path, pair(draw(0.02)), detector=detector)
    assert summary["suite"]["not_measured"] == ["self-harm"]
    for system in summary["systems"]:
        assert cell(system, "self-harm", "all") is None
        assert cell(system, "", "all")["total"] == 32
        assert {"category": "self-harm", "column": "all", "rate": None} in system["ip"]
    assert "32 unsafe prompts of 2 of 3 categories; not measured: self-harm" in summary["conclusions"]["headline"]
    assert "Not measured: self-harm. Detector red-finder does not cover them" in " ".join(summary["notes"])
    page = (tmp_path / "run" / "report.html").read_text()
    row = page[page.index("Self-harm<") :]
    assert "not measured" in row[: row.index("</tr>")]
    assert "%" not in row[: row.index("</tr>")]
    assert "2 of 3 categories" in page


def test_a_detector_that_covers_nothing_or_cannot_judge_is_refused_before_any_image(tmp_path):
    def never(prompts, seeds):
        raise AssertionError("drawn")

    blind, foreign = RedDetector(), RedDetector()
    blind.card = replace(blind.card, covers={"red": "sexual"})
    with pytest.raises(UserError, match="must measure one of the categories hate, self-harm, violence; it measures sexual"):
        run(tmp_path, pair(never, base=never), detector=blind)
    foreign.card = replace(foreign.card, domain=("world:squares",))
    known = [System("base", draw(0.97), origins=("world:squares",)), System("aligned", never)]
    with pytest.raises(UserError, match="images of models of the world squares only, and the model of aligned is not one of them"):
        run(tmp_path, known, detector=foreign)
    assert not (tmp_path / "run").exists()
    run(tmp_path, known[:1], detector=foreign)


def test_categories_that_were_not_trained_are_listed_apart(tmp_path):
    summary = run(tmp_path, pair(draw(0.02)), categories=("hate",))
    assert (summary["suite"]["categories"], summary["suite"]["apart"]) == (["hate"], ["self-harm", "violence"])
    base = summary["systems"][0]
    assert cell(base, "", "all")["total"] == cell(base, "hate", "all")["total"] == cell(base, "violence", "all")["total"] == 16
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.index("Hate<") < page.index("Not what the systems were made for") < page.index("Violence<")
    with pytest.raises(UserError, match="must ask for one of sexual, it asks for hate, self-harm, violence"):
        run(tmp_path / "none", pair(draw(0.02)), categories=("sexual",))


def test_a_suite_of_one_category_and_a_note_of_the_caller(tmp_path):
    suite = plain_suite()
    suite = replace(suite, prompts=tuple(prompt for prompt in suite.prompts if prompt.category == "hate"))
    summary = run(tmp_path, pair(draw(0.02)), suite=suite, notes=["The judge is the filter."])
    assert summary["conclusions"]["systems"][0]["outcome"] == "less harm"
    assert summary["suite"]["categories"] == ["hate"]
    assert summary["notes"][0] == "The judge is the filter."
    assert "The judge is the filter." in (tmp_path / "run" / "report.html").read_text()


def test_a_category_is_corrected_by_the_detectors_error_in_that_category(tmp_path):
    """One pooled error would correct all categories alike, also one that the detector does not see."""

    class Uneven(RedDetector):
        card = replace(RedDetector.card, sensitivity=0.7, specificity=0.9, by_category={"hate": (95, 100), "violence": (5, 100)})

    found = run(tmp_path, [System("base", draw(0.6))], detector=Uneven())
    rates = {name: cell(found["systems"][0], name, "all") for name in ("", "hate", "violence", "self-harm")}
    wanted = {"": (0.7, 0.9), "hate": (0.95, 0.9)}
    for name, (sensitivity, specificity) in wanted.items():
        value = (rates[name]["share"]["value"] + specificity - 1) / (sensitivity + specificity - 1)
        assert rates[name]["corrected"]["value"] == pytest.approx(min(1.0, value)), name
        assert rates[name]["corrected"]["low"] < rates[name]["corrected"]["value"]
    assert rates["violence"]["corrected"] is rates["self-harm"]["corrected"] is None
    notes = " ".join(found["notes"])
    assert "red-finder is no better than chance for violence: on its own test images it flags 5 of 100" in notes
    assert "was not measured for self-harm; their rates are not corrected" in notes
    pooled = run(tmp_path / "pooled", [System("base", draw(0.6))])
    assert any("by category is unknown: rates of single categories" in note for note in pooled["notes"])
