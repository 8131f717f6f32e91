"""The comparison of methods on a model, prompts and a detector of the user's own.

It is `bench_methods` without what only a world has: LiVO, whose values need a judge of both sides, social bias, whose prompts are a
world's, and curves of convergence. What all methods have in common is the same: runs with trainings and seeds of their own,
settings chosen by one rule, one report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from valign.data.prompts.sources import Source
from valign.detectors import Detector
from valign.evaluation import Evaluators, ReportOptions, System, base_system, evaluate
from valign.evaluation.composed import guarded_system, suite_of_runs
from valign.evaluation.images.folder import ImageFolder
from valign.evaluation.report.report import write_report
from valign.evaluation.results import read_results
from valign.evaluation.suite import Suite
from valign.experiments.methods.bench import cost_section, harm_by_run, run_section
from valign.experiments.methods.trained import DPO, ComparedConfig, Trained, train_compared
from valign.experiments.methods.tuned import PROMPTS, TunedMethods, tuning_record, tuning_section
from valign.files import write_json
from valign.guard import Guard
from valign.models.diffusion.base import DiffusionModel
from valign.policy import Policy
from valign.recipes.align import AlignConfig
from valign.recipes.tuning import tuning_suite


def bench_own_model(
    model: DiffusionModel,
    policy: Policy,
    source: Source,
    tests: Suite,
    evaluators: Evaluators,
    out: Path,
    configs: Sequence[ComparedConfig],
    *,
    keeper: Detector | None = None,
) -> dict[str, Any]:
    """Run or resume the comparison in ``out``, one run per config; returns the evaluation's summary.

    Args:
        source: Of the prompt pairs of every run, which generates images of its own for them.
        tests: Test prompts of every run, each with other seeds; none may be in the data.
        keeper: Filters the image pairs, where the configuration asks for it, and judges the candidates; the evaluators' detector if
            left out.
    Writes ``evaluation/report.html`` with everything, and ``bench.json``.
    """
    chooser = keeper or evaluators.detector
    folders = [out / f"run-{number}" for number in range(len(configs))]
    runs = [
        train_compared(model, policy, source, folder, config, detector=chooser, suite=tests)
        for folder, config in zip(folders, configs, strict=True)
    ]

    def tuning(run: int) -> Suite:
        align = configs[run].align
        return tuning_suite(runs[run].experts.pairs, _harmless(runs[run], align), limit=PROMPTS, seed=align.seed)

    methods = TunedMethods(tuning, model, policy, configs, runs)
    tuned = methods.choose(Evaluators(chooser, evaluators.fidelity, clip=evaluators.clip), out / "tuning")
    compared = _systems(model, policy, configs[0], methods.chosen(tuned, out / "tuning"))
    asked = suite_of_runs([tests] * len(configs))
    report = ReportOptions(title=f"Methods compared on {Path(model.folder).name}, {len(configs)} run{'s' * (len(configs) > 1)}")
    categories = tuple(dict.fromkeys(name for run in runs for name in run.experts.results))
    sampling = configs[0].sampling
    summary = evaluate(compared, asked, evaluators, out=out / "evaluation", report=report, sampling=sampling, categories=categories)
    rows, made = read_results(out / "evaluation" / "results.parquet"), [run.made for run in runs]
    by_run = harm_by_run(rows, len(configs))
    record = {
        "trained": {name: [{**asdict(run[name]), "folder": run[name].folder.name} for run in made] for name in made[0]},
        "tuned": {name: {"chosen": dict(one.chosen), "candidates": tuning_record(one)} for name, one in tuned.items()},
        "by_run": by_run,
    }
    write_json(out / "bench.json", record)
    images = {system.name: ImageFolder(out / "evaluation" / "images" / system.name) for system in compared}
    sections = [tuning_section(tuned, methods.prompts()), cost_section(made), run_section(by_run)]
    write_report(out / "evaluation" / "report.html", summary, rows, asked, images, report, sections=sections)
    return summary


def _harmless(run: Trained, align: AlignConfig) -> list[str]:
    """Captions that training leaves alone, or the pairs' safe prompts where there are none."""
    return list(align.data.retain) or list(dict.fromkeys(pair.safe for pair in run.experts.pairs))


def _systems(model: DiffusionModel, policy: Policy, config: ComparedConfig, tuned: dict[str, System]) -> list[System]:
    """The base, every method as it was chosen, and the policy's guard before the base and before plain DPO."""
    base, guard = base_system(model, config.sampling), Guard.from_policy(policy)
    behind = {"guard": base, f"guard-{DPO}": tuned[DPO]}
    return [base, *tuned.values(), *(guarded_system(inner, guard, name=name) for name, inner in behind.items())]
