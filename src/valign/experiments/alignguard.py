"""AlignGuard on the shapes world, in full: seven experts, every merge, the joint LoRA and the free baselines in one report."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from valign.data.build import build_data
from valign.data.prompts.pairs import PromptPair, load_pairs
from valign.data.prompts.sources import GrammarSource
from valign.detectors.oracle import OracleDetector
from valign.evaluation import System, adapter_system, evaluate
from valign.experiments.shapes_budgets import PER_CONCEPT, STRENGTH, Budget, shapes_config
from valign.files import read_json, write_json
from valign.merging import MERGES, Expert
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.lora import load_adapter, unload_adapters
from valign.models.encoders.clip import ClipEncoder
from valign.models.files.adapter_files import open_adapter
from valign.policy import Policy
from valign.progress import track
from valign.recipes.align import AlignConfig, baselines
from valign.recipes.alignguard import JOINT, train_expert, train_experts
from valign.recipes.merged import calibration_prompts, merge_experts
from valign.worlds.shapes import Grammar, reference_images, suite

SLD = ("weak", "medium", "strong", "max")
# Weight of each expert in a merge, and of the joint adapter, found on the prompts of another seed. Above 1 where neurons or entries
# are shared out.
WEIGHTS = {"co-merge": STRENGTH, "ties": 2.5, "dare-ties": 2.5, "mean": 1.0, "sum": 1.1, "best-single": 1.0, JOINT: 1.5}
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

    def scores() -> Mapping[str, float]:
        return _scores(model, experts, pairs, oracle, out / "merged" / "scores.json", config)

    adapters = {JOINT: joint.adapter}
    for name in MERGES:
        weighted = [replace(expert, weight=WEIGHTS[name]) for expert in experts]
        adapters[name] = merge_experts(
            model,
            weighted,
            pairs,
            out / "merged" / name,
            merge=name,
            per_category=config.calibration,
            seed=seed,
            scores=scores,
        )
    return evaluate(
        [*baselines(model, policy, config), *(_system(model, name, folder, config) for name, folder in sorted(adapters.items()))],
        suite(per_concept=PER_CONCEPT[budget], seed=seed),
        oracle,
        out=out / "evaluation",
        fidelity=oracle,
        features=oracle,
        clip=clip,
        reference=reference_images(per_concept=PER_CONCEPT[budget], seed=seed),
        seed=seed,
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        batch_size=config.batch_size,
        title="AlignGuard on the shapes world: experts, merges and baselines",
    )


def _system(model: DiffusionModel, name: str, folder: Path, config: AlignConfig) -> System:
    described = "one LoRA on all categories" if name == JOINT else f"seven experts, {name}"
    return adapter_system(
        model,
        folder,
        name=name,
        description=f"{described}, at weight {WEIGHTS[name]:g}",
        weight=WEIGHTS[JOINT] if name == JOINT else 1.0,  # the merges hold theirs
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        batch_size=config.batch_size,
    )


def _scores(
    model: DiffusionModel,
    experts: Sequence[Expert],
    pairs: Sequence[PromptPair],
    oracle: OracleDetector,
    path: Path,
    config: AlignConfig,
) -> Mapping[str, float]:
    """Share of harmful images that each expert alone leaves on training prompts of all categories."""
    if path.exists():
        return dict(read_json(path))
    chosen = calibration_prompts(pairs, [expert.name for expert in experts])
    prompts = [text for texts in chosen.values() for text in texts[:SCORING]]
    scores = {}
    for expert in track(experts, "scoring experts"):
        load_adapter(model, expert.file.folder, name="scored")
        try:
            images = model.generate(
                prompts,
                seeds=range(len(prompts)),
                steps=config.steps,
                guidance_scale=config.guidance_scale,
                batch_size=config.batch_size,
            )
        finally:
            unload_adapters(model)
        scores[expert.name] = float((oracle.detect(images) >= oracle.card.threshold).any(axis=1).mean())
    write_json(path, scores)
    return scores
