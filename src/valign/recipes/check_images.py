"""The check of diffusion models: both generate at equal prompts and seeds, a detector looks at the images."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from valign.checks import UserError
from valign.data.prompts.overlap import fold
from valign.detectors import build
from valign.detectors.base import check_domain
from valign.evaluation import Evaluators, ReportOptions, Suite, System, evaluate
from valign.evaluation.chats.judges import (
    JudgeCard,
)
from valign.evaluation.checking.decision import DriftLimits, check_sample
from valign.evaluation.checking.outcomes import PairedOutcome, image_outcomes
from valign.evaluation.paired_drift import EXACT, JudgeError
from valign.evaluation.policy_suite import policy_suite
from valign.evaluation.results import ImageResult, read_results
from valign.files import read_json
from valign.interfaces import DetectorCard, SamplingConfig
from valign.models.files.origin import model_origins
from valign.policy import Policy
from valign.recipes.check_result import SIDES, CheckNames, CheckOptions, check_different, decided, write_check
from valign.recipes.subjects import Subject
from valign.runs import Run
from valign.worlds import WORLDS, find_oracle


def check_images(
    before: System,
    after: System,
    suite: Suite,
    evaluators: Evaluators,
    *,
    out: Path,
    limits: DriftLimits,
    sampling: SamplingConfig,
    names: CheckNames,
) -> dict[str, Any]:
    """Generate with both models at equal prompts and seeds, measure, decide, report; the images' own report is in ``evaluation/``.

    Raises: UserError, before any image, if there are too few prompts for a verdict; and what `evaluate` refuses.
    """
    check_different(before.fingerprint, after.fingerprint)
    card = evaluators.detector.card
    check_image_sample(suite, card, limits)
    run = Run.open(
        out,
        step="check",
        recipe={**asdict(limits), "names": asdict(names), "sampling": asdict(sampling), **evaluators.describe()},
        inputs={"suite": suite.fingerprint(), "before": before.fingerprint, "after": after.fingerprint},
        seed=sampling.seed,
    )
    if run.done and (out / "check.json").exists():
        return dict(read_json(out / "check.json"))
    title = ReportOptions(title="Before and after")
    summary = evaluate([before, after], suite, evaluators, out=out / "evaluation", sampling=sampling, report=title)
    found = read_results(out / "evaluation" / "results.parquet")
    sides = [[row for row in found if row.system == one.name and _counts(row, card)] for one in (before, after)]
    judge = JudgeCard(name=card.name, version=card.weights_sha256[:12], harm=detector_error(card), refusals=EXACT)
    outcomes = image_outcomes(*sides)
    own = {name: card.within(name) for name in suite.categories() if card.measures(name)}
    errors = {name: detector_error(one) for name, one in own.items() if one.better_than_chance() is not False}
    blind = ""
    if judge.harm is None and not any(row.harmful for rows in sides for row in rows):
        blind = (
            f"Detector {card.name} found no image harmful on either side, and its own error was never measured: it is not shown "
            "that it would see harm. Measure it: `valign detector evaluate --save`."
        )
    result = decided("diffusion", outcomes, limits, names, judge, notes=summary["notes"], by_category=errors, blind=blind)
    moved = [one for one in outcomes if one.known and one.before.bad != one.after.bad]
    changed = [{"id": one.id, "category": one.category, "text": "", **_image_words(one)} for one in moved]
    return write_check(run, out, result, changed, shown=False)


def detector_error(card: DetectorCard) -> JudgeError | None:
    """A detector's own error as a judge's; None where it was never measured.

    Raises: UserError if the detector is no better than chance.
    """
    if card.sensitivity is None or card.specificity is None:
        return None
    return JudgeError(
        sensitivity=card.sensitivity, specificity=card.specificity, positives=card.positives, negatives=card.negatives
    )


def _counts(row: ImageResult, card: DetectorCard) -> bool:
    return row.benign or card.measures(row.category)


def _image_words(one: PairedOutcome) -> dict[str, dict[str, str]]:
    words = ("harmless", "harmful") if one.risky else ("an image", "no image")
    return {side: {"word": words[bool(getattr(one, side).bad)], "text": ""} for side in SIDES}


def check_image_sample(suite: Suite, card: DetectorCard, limits: DriftLimits) -> None:
    texts = [{fold(one.prompt) for one in suite.prompts if wanted(one)} for wanted in (lambda p: not p.benign, lambda p: p.benign)]
    check_sample(len(texts[0]), len(texts[1]), limits, harm=detector_error(card), refusals=None)


def image_tests(
    policy: Policy, given: Suite | None, detector: str | Sequence[str], subject: Subject, options: CheckOptions
) -> tuple[Suite, Evaluators]:
    """The prompts, and what looks at the images; a world's own for its models.

    Raises: UserError where nobody is named who judges the images, or the detector cannot judge this model's.
    """
    origins = model_origins(subject.folder)
    world = next((one for one in WORLDS.values() if set(one.origins) & set(origins)), None)
    if not detector and world is None:
        raise UserError("--detector must name what judges the images, got nothing. See `valign detector list`.")
    judge = build(detector, oracle=find_oracle) if detector else world.oracle()  # type: ignore[union-attr]
    check_domain(judge.card, origins, subject.name)
    if given is not None:
        tests = given
    elif world is not None and world.policy == policy.id:
        tests = world.suite(**({} if options.samples is None else {"per_concept": options.samples}), seed=options.seed)
    else:
        tests = policy_suite(policy)
    return tests, Evaluators(judge, fidelity=world.oracle() if world else None, clip=world.clip() if world else None)


def image_systems(first: Subject, second: Subject, sampling: SamplingConfig, *, device: str, anyway: bool) -> tuple[System, System]:
    from valign.evaluation import adapter_system, base_system
    from valign.models.diffusion.loading import load_model

    loaded = {folder: load_model(folder, device=device) for folder in dict.fromkeys((first.folder, second.folder))}

    def system(side: str, one: Subject) -> System:
        if one.adapter is None:
            return base_system(loaded[one.folder], sampling, name=side)
        return adapter_system(loaded[one.folder], one.adapter, sampling, name=side, anyway=anyway)

    return system("before", first), system("after", second)
