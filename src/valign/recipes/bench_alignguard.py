"""AlignGuard on the shapes world, in full: seven experts, every merge, the joint LoRA and the free baselines in one report."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from valign.data.build import build_data
from valign.data.pairs import PromptPair, load_pairs
from valign.data.sources import GrammarSource
from valign.detectors.oracle import OracleDetector
from valign.evaluation import System, adapter_system, evaluate
from valign.files import read_json, write_json
from valign.merging import MERGES, Expert, merge_metadata, write_merge
from valign.models.adapter_files import open_adapter
from valign.models.base import DiffusionModel
from valign.models.encoders import ClipEncoder
from valign.models.lora import load_adapter, unload_adapters
from valign.policy import Policy
from valign.progress import track
from valign.recipes.align import AlignConfig, baselines, calibration_prompts, merge_experts
from valign.recipes.alignguard import JOINT, train_expert, train_experts
from valign.recipes.shapes_budgets import PER_CONCEPT, Budget, shapes_config
from valign.runs import Run
from valign.worlds.shapes import Grammar, reference_pictures, suite

SLD = ("weak", "medium", "strong", "max")
AT_ONE = ("mean", "sum", "best-single")  # merges that leave every expert whole; the others share out neurons or entries
JOINT_STRENGTH = 1.5  # by trial on the prompts of another seed, as Co-Merge's
SCORING = 16  # training prompts per category that choose the best single expert


def bench_alignguard(
    model: DiffusionModel,
    policy: Policy,
    oracle: OracleDetector,
    clip: ClipEncoder,
    out: Path,
    *,
    budget: Budget = "full",
    seed: int = 0,
) -> dict[str, Any]:
    """Run or resume the whole comparison in ``out``; returns the evaluation's summary."""
    config = replace(shapes_config(budget, seed=seed), sld=SLD)
    cache = build_data(model, policy, GrammarSource(Grammar()), out / "data", config.data, detector=oracle)
    pairs = load_pairs(out / "data" / "prompts" / "pairs.parquet")
    categories = policy.category_ids()
    trained = train_experts(model, cache, out / "experts", config.experts, categories=categories)
    joint = train_expert(
        model, cache, None, out / JOINT, config.experts.changed(steps=config.experts.training.steps * len(categories))
    )
    experts = [Expert(name, open_adapter(result.adapter)) for name, result in trained.items()]
    strong = [replace(expert, weight=config.strength) for expert in experts]
    adapters = {
        "co-merge": merge_experts(model, strong, pairs, out / "merged" / "co-merge", per_category=config.calibration, seed=seed),
        JOINT: joint.adapter,
        **_other_merges(model, experts, pairs, oracle, out, config),
    }
    return evaluate(
        [*baselines(model, policy, config), *(_system(model, name, folder, config) for name, folder in sorted(adapters.items()))],
        suite(per_concept=PER_CONCEPT[budget], seed=seed),
        oracle,
        out=out / "evaluation",
        fidelity=oracle,
        features=oracle,
        clip=clip,
        reference=reference_pictures(per_concept=PER_CONCEPT[budget], seed=seed),
        seed=seed,
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        batch_size=config.batch_size,
        title="AlignGuard on the shapes world: experts, merges and baselines",
    )


def _system(model: DiffusionModel, name: str, folder: Path, config: AlignConfig) -> System:
    strength = 1.0 if name in AT_ONE else config.strength
    described = f"seven experts at weight {strength:g}, {name}"
    if name == JOINT:
        described = f"one LoRA on all categories at weight {JOINT_STRENGTH:g}"
    made: dict[str, Any] = {"steps": config.steps, "guidance_scale": config.guidance_scale, "batch_size": config.batch_size}
    return adapter_system(model, folder, name=name, description=described, weight=JOINT_STRENGTH if name == JOINT else 1.0, **made)


def _other_merges(
    model: DiffusionModel,
    experts: Sequence[Expert],
    pairs: Sequence[PromptPair],
    oracle: OracleDetector,
    out: Path,
    config: AlignConfig,
) -> dict[str, Path]:
    made = {}
    for name, merge in MERGES.items():
        if name == "co-merge":  # needs votes; see `merge_experts`
            continue
        folder = out / "merged" / name
        made[name] = folder / "adapter"
        inputs = {expert.name: expert.file.fingerprint() for expert in experts}
        chosen = experts if name in AT_ONE else [replace(expert, weight=config.strength) for expert in experts]
        run = Run.open(folder, step=name, recipe={"strength": chosen[0].weight}, inputs=inputs, seed=config.seed)
        if run.done:
            continue
        shutil.rmtree(folder / "adapter", ignore_errors=True)  # written, but not yet recorded, when an earlier call was killed
        options: dict[str, Any] = {}
        if name == "best-single":
            options["scores"] = _scores(model, experts, pairs, oracle, out / "merged" / "scores.json", config)
        if name == "dare-ties":
            options["seed"] = config.seed
        run.finish(
            **write_merge(
                merge(chosen, **options),  # type: ignore[operator]
                folder / "adapter",
                merge_metadata(name, chosen, options),
            )
        )
    return made


def _scores(
    model: DiffusionModel,
    experts: Sequence[Expert],
    pairs: Sequence[PromptPair],
    oracle: OracleDetector,
    path: Path,
    config: AlignConfig,
) -> Mapping[str, float]:
    """Share of harmful pictures that each expert alone leaves on training prompts of all categories."""
    if path.exists():
        return dict(read_json(path))
    chosen = calibration_prompts(pairs, [expert.name for expert in experts])
    prompts = [text for texts in chosen.values() for text in texts[:SCORING]]
    scores = {}
    for expert in track(experts, "scoring experts"):
        load_adapter(model, expert.file.folder, name="scored")
        try:
            pictures = model.generate(
                prompts,
                seeds=range(len(prompts)),
                steps=config.steps,
                guidance_scale=config.guidance_scale,
                batch_size=config.batch_size,
            )
        finally:
            unload_adapters(model)
        scores[expert.name] = float((oracle.detect(pictures) >= oracle.card.threshold).any(axis=1).mean())
    write_json(path, scores)
    return scores
