"""The whole evaluation in one folder, resumed after a kill: images, ``results.parquet``, ``summary.json``, ``report.html``.

A suite of stand-ins also gets ``before_after.png``.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from valign.checks import UserError, check_choice
from valign.detectors.any_of import AnyOf
from valign.detectors.base import check_coverage, check_domain, error_notes
from valign.evaluation.agreement import agreements
from valign.evaluation.conclusions import conclude
from valign.evaluation.images.before_after import write_before_after
from valign.evaluation.images.folder import make_images
from valign.evaluation.images.frechet import size_warning
from valign.evaluation.images.measuring import Evaluators, Measured, measure
from valign.evaluation.report.disagreements import agreement_sections
from valign.evaluation.report.report import ReportOptions, write_report
from valign.evaluation.results import write_results
from valign.evaluation.suite import Suite
from valign.evaluation.summary import summarize
from valign.evaluation.systems import System
from valign.files import hash_value, read_json, write_json
from valign.interfaces import Detector, KeepsAnswers, SamplingConfig
from valign.runs import Run, versions


def evaluate(
    systems: Mapping[str, System] | Iterable[System],
    suite: Suite,
    evaluators: Evaluators,
    *,
    out: Path,
    base: str | None = None,
    sampling: SamplingConfig | None = SamplingConfig(batch_size=16),
    report: ReportOptions | None = None,
    categories: Collection[str] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Generate, measure, compare and report; return what ``summary.json`` holds.

    Args:
        systems: What to compare. ``base`` names the one that the others are measured against; the first one if not given.
        sampling: What the systems were made with; recorded, and a change makes new images. Its batch size is also the prompts
            per call of a system, its seed that of every image's own seed and of all resampling. None: made elsewhere, unknown.
        categories: Those that the systems were made for; what else the suite asks for is listed apart. None for all.
        notes: What a reader must know besides.
    Raises: UserError, before any image, if the detector cannot judge a system's images or measures none of the categories; and if
        ``out`` holds an evaluation of another suite, seed or setting.
    """
    listed, report = _ordered(systems, base), report or ReportOptions()
    focus = counted_categories(suite, evaluators.detector, categories)
    for system in listed:
        check_domain(evaluators.detector.card, system.origins, f"the model of {system.name}")
    made = sampling or SamplingConfig()
    seed = made.seed
    settings: dict[str, Any] = {"seed": seed, "steps": made.steps, "guidance_scale": made.guidance_scale} if sampling else {}
    detector, reference = evaluators.detector, evaluators.reference
    named, reader = evaluators.feature_reader()
    run = Run.open(out, step="evaluation", recipe=settings, inputs={"suite": suite.fingerprint()}, seed=seed)
    wanted = hash_value(
        {
            "systems": [(system.name, system.fingerprint, system.description) for system in listed],
            **evaluators.describe(),
            "report": [report.title, report.veil, report.show_prompts],
            "categories": focus,
            "notes": list(notes),
        }
    )
    if run.done and run.results.get("wanted") == wanted and (out / "report.html").exists():
        return dict(read_json(out / "summary.json"))

    seeds = suite.seeds(seed)
    folders = {
        system.name: make_images(system, suite, seeds, out / "images" / system.name, settings=settings, batch_size=made.batch_size)
        for system in listed
    }
    if isinstance(detector, KeepsAnswers):
        detector.keep_answers(out / "answers")
    measured: dict[str, Measured] = {}
    for system in listed:
        before = measured.get(listed[0].name)
        measured[system.name] = measure(system.name, folders[system.name], before, suite, seeds, evaluators)
    rows = [row for system in listed for row in measured[system.name].rows]
    write_results(out / "results.parquet", rows)
    found = summarize(
        listed,
        measured,
        detector.card,
        seconds={name: folder.seconds_per_image() for name, folder in folders.items()},
        categories=focus,
        reference=None if reference is None or reader is None else np.asarray(reader(list(reference)), dtype=np.float64),
        seed=seed,
    )
    agreed = agreements(detector, rows, seed=seed) if isinstance(detector, AnyOf) else []
    summary = {
        "title": report.title,
        "suite": {
            "name": suite.name,
            "prompts": len(suite),
            "unsafe": sum(not prompt.benign for prompt in suite.prompts),
            "counted": sum(prompt.category in focus for prompt in suite.prompts),
            "benign": sum(prompt.benign for prompt in suite.prompts),
            "held_out": sum(prompt.held_out for prompt in suite.prompts),
            "categories": list(focus),
            "not_measured": [name for name in suite.categories() if not detector.card.measures(name)],
            "apart": [name for name in suite.categories() if name not in focus],
            "stand_in": suite.stand_in,
            "fingerprint": suite.fingerprint(),
        },
        "detector": asdict(detector.card),
        "features": named,
        "settings": settings,
        "versions": versions(),
        "base": listed[0].name,
        "systems": [asdict(system) for system in found],
        "conclusions": asdict(conclude(listed, found, {name: one.rows for name, one in measured.items()}, detector.card, focus)),
        "agreement": [asdict(one) for one in agreed],
        "notes": [*notes, *_notes(found, measured, detector, reader is not None, focus)],
    }
    write_json(out / "summary.json", summary)
    sections = agreement_sections(agreed, rows, suite, folders, detector.card)
    write_report(out / "report.html", summary, rows, suite, folders, report, sections=sections)
    if suite.stand_in and not report.veil:
        write_before_after(out / "before_after.png", suite, folders)
    run.finish(wanted=wanted)
    return summary


def counted_categories(suite: Suite, detector: Detector, categories: Collection[str] | None = None) -> tuple[str, ...]:
    """The suite's categories that count: those among ``categories``, or all for None.

    Raises: UserError if the suite asks for none of them, or the detector measures none.
    """
    counted = tuple(name for name in suite.categories() if categories is None or name in categories)
    if suite.categories() and not counted:
        raise UserError(
            f"Suite {suite.name} must ask for one of {', '.join(categories or ())}, it asks for {', '.join(suite.categories())}. "
            "Choose another suite."
        )
    check_coverage(detector.card, counted)
    return counted


def _ordered(systems: Mapping[str, System] | Iterable[System], base: str | None) -> list[System]:
    listed = list(systems.values() if isinstance(systems, Mapping) else systems)
    names = [system.name for system in listed]
    if not listed or len(set(names)) != len(names):
        raise UserError(
            f"evaluate.systems must be systems of distinct names, at least one; got {', '.join(names) or 'none'}. Rename them."
        )
    if base is not None:
        check_choice("evaluate.base", base, names)
        listed.sort(key=lambda system: system.name != base)
    return listed


def _notes(
    found: Sequence[Any], measured: Mapping[str, Measured], detector: Detector, has_features: bool, focus: Sequence[str]
) -> list[str]:
    """What a careful reader must know about these numbers."""
    notes = []
    card = detector.card
    unknown = [name for name in focus if not card.measures(name)]
    if unknown:
        notes.append(f"Not measured: {', '.join(unknown)}. Detector {card.name} does not cover them, and no rate counts them.")
    for name, one in measured.items():
        blank, broken = (sum(getattr(row, name) for row in one.rows) for name in ("blank", "unreadable"))
        looked = [row for row in one.rows if not row.blank and not row.unreadable]
        silent = sum(row.harmful is None and (row.benign or card.measures(row.category)) for row in looked)
        if broken:
            notes.append(f"{broken} of {len(one.rows)} images of {name} cannot be read; they count as not measured.")
        if blank:
            notes.append(f"{blank} of {len(one.rows)} images of {name} are of one colour; they count as not measured.")
        if silent:
            notes.append(f"The detector came to no answer about {silent} of {len(one.rows)} images of {name}; no rate counts them.")
    notes += error_notes(card, focus)
    if isinstance(detector, KeepsAnswers):
        notes += detector.remarks()
    if not has_features:
        notes.append("No features were given: drift in feature space and FID are left out.")
    distance = next((system.frechet for system in found if system.frechet), None)
    if distance:
        dim = len(next(iter(next(iter(measured.values())).features.values())))
        notes += [note] if (note := size_warning(distance.count, dim)) else []
    if len(found) > 1:
        notes.append("p-values of tables are two-sided, from McNemar's exact test, and not adjusted for their number.")
        notes.append("What is concluded rests on p-values adjusted by Holm for the number of systems, below 0.05.")
    if any(len({row.cluster for row in one.rows}) < len(one.rows) for one in measured.values()):
        notes.append("Some prompts have several images: intervals and tests take the images of one prompt together.")
    return notes
