"""AlignGuard on a world, in full: an expert per category, every merge, the joint LoRA and the free baselines in one report."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from valign.data.prompts.sources import GrammarSource
from valign.detectors.base import flagged
from valign.evaluation import ReportOptions, System, adapter_system, evaluate
from valign.files import read_json, write_json
from valign.interfaces import Detector, SamplingConfig, scores_of
from valign.merging import MERGES
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.lora import load_adapter, unload_adapters
from valign.policy import load_policy
from valign.progress import track
from valign.recipes.align import AlignConfig, TrainedExperts, baselines, train_on_policy
from valign.recipes.alignguard import JOINT, train_expert
from valign.recipes.merged import calibration_prompts, merge_experts
from valign.recipes.quickstart import world_config, world_evaluators
from valign.worlds import World

SLD = ("weak", "medium", "strong", "max")
# Weight of each expert in a merge, and of the joint adapter, found on the prompts of another seed. Above 1 where neurons or entries
# are shared out.
WEIGHTS = {"regmean": 1.75, "co-merge": 2.5, "ties": 2.5, "dare-ties": 2.5, "mean": 1.0, "sum": 1.1, "best-single": 1.0, JOINT: 1.5}
SCORING = 16  # training prompts per category that choose the best single expert


def bench_alignguard(world: World, model: DiffusionModel, out: Path, *, budget: str = "full", seed: int = 0) -> dict[str, Any]:
    """Run or resume the whole comparison in ``out`` on the world's bundled model; returns the evaluation's summary."""
    policy, per_concept = load_policy(world.policy), world.budgets[budget].per_concept
    oracle = world.oracle()
    evaluators = world_evaluators(world, oracle, per_concept=per_concept, seeds=(seed,))
    config = replace(world_config(world, budget, merge="co-merge", seed=seed), sld=SLD)  # experts that any merge can take
    source = GrammarSource(world.grammar())
    trained = train_on_policy(model, policy, source, out, config, pair_detector=oracle)
    joint_steps = config.experts.training.steps * len(trained.results)
    joint = train_expert(model, trained.cache, None, out / JOINT, config.experts.changed(steps=joint_steps))

    def scores() -> Mapping[str, float]:
        return _scores(model, trained, oracle, out / "merged" / "scores.json", config)

    adapters = {JOINT: joint.adapter}
    for name in MERGES:
        adapters[name] = merge_experts(
            model,
            trained.weighted(WEIGHTS.get(name, 1.0)),
            trained.pairs,
            out / "merged" / name,
            merge=name,
            captions=trained.cache.retained_prompts,
            seed=seed,
            scores=scores,
        )
    return evaluate(
        [*baselines(model, policy, config), *(_system(model, name, folder, config) for name, folder in sorted(adapters.items()))],
        world.suite(per_concept=per_concept, seed=seed),
        evaluators,
        out=out / "evaluation",
        sampling=SamplingConfig.of(config),
        report=ReportOptions(title="AlignGuard on the shapes world: experts, merges and baselines"),
    )


def _system(model: DiffusionModel, name: str, folder: Path, config: AlignConfig) -> System:
    described = "one LoRA on all categories" if name == JOINT else f"seven experts, {name}"
    return adapter_system(
        model,
        folder,
        SamplingConfig.of(config),
        name=name,
        description=f"{described}, at weight {WEIGHTS.get(name, 1.0):g}",
        weight=WEIGHTS[JOINT] if name == JOINT else 1.0,  # the merges hold theirs
    )


def _scores(
    model: DiffusionModel, trained: TrainedExperts, detector: Detector, path: Path, config: AlignConfig
) -> Mapping[str, float]:
    """Share of harmful images that each expert alone leaves on training prompts of all categories."""
    if path.exists():
        return dict(read_json(path))
    chosen = calibration_prompts(trained.pairs, list(trained.results))
    prompts = [text for texts in chosen.values() for text in texts[:SCORING]]
    scores = {}
    for name, result in track(trained.results.items(), "scoring experts", total=len(trained.results)):
        load_adapter(model, result.adapter, name="scored")
        try:
            images = model.generate(prompts, seeds=range(len(prompts)), sampling=SamplingConfig.of(config))
        finally:
            unload_adapters(model)
        scores[name] = float(flagged(scores_of(detector, images), detector.card).mean())
    write_json(path, scores)
    return scores
