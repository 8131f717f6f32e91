"""Every method on the shapes world, trained and tested over several seeds: the baselines, AlignGuard, LiVO, the guard.

Run ``r`` has data, trainings, test prompts and draws of its own, and all runs end in one report: an image of run ``r`` is drawn by
what run ``r`` trained, so every difference from the base is paired by prompt and seed.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from valign.data.images.value_sets import open_values
from valign.data.prompts.pairs import load_pairs
from valign.detectors.oracle import OracleDetector
from valign.evaluation import evaluate, refuse_overlap
from valign.evaluation.composed import suite_of_runs
from valign.evaluation.images.folder import ImageFolder
from valign.evaluation.report.report import write_report
from valign.evaluation.report.sections import Section
from valign.evaluation.results import Row, read_results
from valign.evaluation.suite import Suite
from valign.experiments.methods.bias import bias_section, role_bias
from valign.experiments.methods.curves import CurvePoint, convergence, curves_section, mean_curve
from valign.experiments.methods.systems import MethodSystems, principle_retriever
from valign.experiments.methods.trained import LIVO, Made, MethodsConfig, train_methods
from valign.files import write_json
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.value_encoder import ValueText, copy_encoder
from valign.models.encoders.clip import ClipEncoder
from valign.policy import Policy
from valign.recipes.alignguard import JOINT
from valign.training.tasks.preference.trainable import UnetLora
from valign.training.tasks.preference.values import ValueTokens
from valign.worlds.shapes import reference_images, roles
from valign.worlds.shapes import suite as shapes_suite


def bench_methods(
    model: DiffusionModel,
    policy: Policy,
    oracle: OracleDetector,
    clip: ClipEncoder,
    out: Path,
    configs: Sequence[MethodsConfig],
) -> dict[str, Any]:
    """Run or resume the whole comparison in ``out``, one run per config; returns the evaluation's summary.

    Writes ``evaluation/report.html`` with everything, and ``bench.json`` with what the evaluation does not hold: costs, bias,
    curves, and harm by run.
    """
    folders = [out / f"run-{number}" for number in range(len(configs))]
    made = [train_methods(model, policy, oracle, folder, config) for folder, config in zip(folders, configs)]
    systems = MethodSystems(model, policy, principle_retriever(policy), configs[0])
    drawing, compared = systems.config.drawing, systems.all(made)
    parts = [shapes_suite(per_concept=config.per_concept, seed=config.align.seed) for config in configs]
    tests = suite_of_runs(parts)
    for folder, config, part in zip(folders, configs, parts):
        refuse_trained(part, folder, config)
    curves = _curves(systems, folders, configs, parts, oracle)
    asked = suite_of_runs([roles(images=config.role_images, seed=config.align.seed) for config in configs])
    mixed = [systems.livo(made, name=f"{LIVO}-{mixing:g}", mixing=mixing) for mixing in (0.0, 1.0)]
    bias = role_bias([*compared, *mixed], asked, oracle, out / "bias", drawing)
    summary = evaluate(
        compared,
        tests,
        oracle,
        out=out / "evaluation",
        fidelity=oracle,
        features=oracle,
        clip=clip,
        reference=[
            image for config in configs for image in reference_images(per_concept=config.per_concept, seed=config.align.seed)
        ],
        title=f"Every method on the shapes world, {len(configs)} runs",
        **drawing,
    )
    rows = read_results(out / "evaluation" / "results.parquet")
    harm = next(cell["rate"]["share"]["value"] for cell in summary["systems"][0]["ip"] if cell["column"] == "explicit")
    drawn = {name: mean_curve(found, 100 * harm) for name, found in curves.items()}
    by_run = harm_by_run(rows, len(configs))
    record = {
        "trained": {name: [{**asdict(run[name]), "folder": run[name].folder.name} for run in made] for name in made[0]},
        "bias": [asdict(one) for one in bias],
        "curves": {name: [asdict(point) for point in points] for name, points in drawn.items()},
        "by_run": by_run,
    }
    write_json(out / "bench.json", record)
    write_report(
        out / "evaluation" / "report.html",
        summary,
        rows,
        tests,
        {system.name: ImageFolder(out / "evaluation" / "images" / system.name) for system in compared},
        sections=[cost_section(made), bias_section(bias), curves_section(drawn), _run_section(by_run)],
    )
    return summary


def _curves(
    systems: MethodSystems,
    folders: Sequence[Path],
    configs: Sequence[MethodsConfig],
    parts: Sequence[Suite],
    oracle: OracleDetector,
) -> dict[str, list[list[CurvePoint]]]:
    """Of DPO and LiVO, one curve per run, on the explicit prompts of concepts that training saw."""
    model: Any = systems.model
    found: dict[str, list[list[CurvePoint]]] = {"dpo": [], LIVO: []}
    for folder, config, part in zip(folders, configs, parts):
        shown = Suite(part.name, tuple(p for p in part.prompts if p.kind == "explicit" and not p.held_out), part.stand_in)
        seen: dict[str, Any] = {"suite": shown, "detector": oracle, "drawing": config.drawing, "seed": config.align.seed}
        joint = config.joint(systems.policy).training
        expert, every, out = UnetLora(model, joint), joint.checkpoint_every, folder / "curves"
        found["dpo"].append(
            convergence(expert, folder / JOINT, every, lambda made: systems.adapted("dpo", made), out=out / "dpo", **seen)
        )
        known = list(map(ValueText.read, open_values(folder / "values").principles))
        fresh = copy_encoder(model, known, layout=config.livo.layout, lora_rank=config.livo.lora_rank)
        every = config.every(config.livo.training.steps)
        found[LIVO].append(convergence(ValueTokens(model, fresh), folder / LIVO, every, systems.valued, out=out / LIVO, **seen))
    return found


def refuse_trained(part: Suite, folder: Path, config: MethodsConfig) -> None:
    """Raise UserError if a run's suite holds prompts that this run trained on; what other runs did draws none of its images."""
    refuse_overlap(part, [*config.align.data.retain, *_trained_on(folder)])


def _trained_on(folder: Path) -> list[str]:
    pairs = load_pairs(folder / "data" / "prompts" / "pairs.parquet")
    return [text for pair in pairs for text in (pair.unsafe, pair.safe)] + list(open_values(folder / "values").prompts)


def harm_by_run(rows: Sequence[Row], runs: int) -> dict[str, list[dict[str, float]]]:
    """``{system: [{"harm": ..., "benign": ...} per run]}``, in per cent: harmful images, and benign prompts drawn right."""
    found: dict[str, list[dict[str, float]]] = {}
    for name in dict.fromkeys(row.system for row in rows):
        for run in range(runs):
            own = [row for row in rows if row.system == name and row.seed % runs == run]
            harm = [row.harmful for row in own if not row.benign]
            right = [bool(row.fidelity) and all(row.fidelity.values()) for row in own if row.benign]
            found.setdefault(name, []).append({"harm": 100 * float(np.mean(harm)), "benign": 100 * float(np.mean(right))})
    return found


def cost_section(made: Sequence[dict[str, Made]]) -> Section:
    """What each method trained, and how long."""
    rows = []
    for name in made[0]:
        seconds = [run[name].seconds for run in made]
        steps = ", ".join(dict.fromkeys(f"{run[name].steps:,}" for run in made))
        rows.append(
            (name, f"{made[0][name].parameters:,}", steps, f"{np.mean(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})")
        )
    return Section(
        title="What training costs",
        text="What is not listed trains nothing.",
        header=("trained parameters", "optimizer steps", "seconds, mean (range) over runs"),
        rows=tuple(rows),
        note="Seconds of training steps alone; data, validation and merging are left out. UCE solves its numbers in closed form.",
    )


def _run_section(by_run: dict[str, list[dict[str, float]]]) -> Section:
    rows = [(name, *(f"{run['harm']:.1f} % / {run['benign']:.1f} %" for run in runs)) for name, runs in by_run.items()]
    return Section(
        title="Run by run",
        text="Harmful images of unsafe prompts / benign prompts drawn right. Each run has its own data, trainings and prompts.",
        header=tuple(f"run {number}" for number in range(len(next(iter(by_run.values()))))),
        rows=tuple(rows),
    )
