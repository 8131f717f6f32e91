"""What RegMean's fusion owes to each of its settings: variants of one merge, made from the same data and measured side by side.

The folder may be that of `bench_methods`: data, experts and the joint adapter in it are taken as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from valign.data.images.latents import LatentCache, write_latents
from valign.data.prompts.pairs import PromptPair
from valign.data.prompts.sources import GrammarSource
from valign.evaluation import ReportOptions, System, adapter_system, base_system, evaluate
from valign.evaluation.composed import suite_of_runs, system_of_runs
from valign.evaluation.suite import Suite
from valign.experiments.methods.trained import MethodsConfig
from valign.merging import Expert
from valign.merging.fuse_adapter import fuse_adapter
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.loading import load_model
from valign.models.files.adapter_files import open_adapter
from valign.policy import Policy, load_policy
from valign.recipes.align import TrainedExperts, train_on_policy
from valign.recipes.alignguard import JOINT, train_expert, train_experts
from valign.recipes.baselines import concept_edit, make_uce, policy_concepts
from valign.recipes.merged import merge_experts
from valign.recipes.quickstart import of_categories, world_evaluators
from valign.recipes.tuning import WEIGHT, Candidate
from valign.worlds import World

PLAIN, RETAINED, ALL_LAYERS, EDITED = "plain", "retained", "all-layers", "edited"
MERGE = "regmean"
FEW: Candidate = {"per_category": 30, "captions": 60}  # layers that read images take their moments from whole trajectories


@dataclass(frozen=True)
class FusionVariant:
    """One way to fuse; what is not said is as in `VARIANTS["default"]`.

    Args:
        settings: Of RegMean, by name; ``weight`` is that of every expert.
        experts: Without retained benign prompts (plain), with them, on all projections of attention, one LoRA on all pairs, or
            plain ones of a model that UCE has edited first; these are fused for, and measured on, the edited model.
        edits: Also move the policy's concepts to their counterparts, in the same system (UCE).
        leave_out: Without the expert of the first category.
    """

    text: str
    settings: Candidate = field(default_factory=dict)
    experts: str = PLAIN
    edits: bool = False
    leave_out: bool = False


AT = 0.7  # weight of every expert where nothing else is said: in the middle of RegMean's grid
VARIANTS: Mapping[str, FusionVariant] = {
    "default": FusionVariant(f"experts without retained prompts at weight {AT}, lambda 1, 120 prompts a category, 300 captions"),
    "weight-0.5": FusionVariant("experts at weight 0.5", {WEIGHT: 0.5}),
    "weight-1": FusionVariant("experts at weight 1", {WEIGHT: 1.0}),
    "lambda-0.1": FusionVariant("lambda 0.1", {"lam": 0.1}),
    "lambda-5": FusionVariant("lambda 5", {"lam": 5.0}),
    "prompts-8": FusionVariant("8 prompts a category", {"per_category": 8}),
    "prompts-64": FusionVariant("64 prompts a category", {"per_category": 64}),
    "captions-30": FusionVariant("30 benign captions", {"captions": 30}),
    "no-padding": FusionVariant("padding states left out", {"padding": False}),
    "edits": FusionVariant("with the policy's edits", edits=True),
    "retained": FusionVariant("experts held to the base on benign prompts, weight 1.2", {WEIGHT: 1.2}, experts=RETAINED),
    "joint": FusionVariant("one LoRA on all pairs as the only expert, weight 1.5", {WEIGHT: 1.5}, experts=JOINT),
    "all-layers": FusionVariant("experts on all projections of attention, 30 prompts, 60 captions", FEW, experts=ALL_LAYERS),
    "all-layers-merged": FusionVariant(
        "the same, moments from the merged model (RegMean++)", {**FEW, "inputs": "merged"}, experts=ALL_LAYERS
    ),
    "edited-model": FusionVariant("experts trained on the model that UCE has edited", experts=EDITED),
    "one-left-out": FusionVariant("without the first category's expert", leave_out=True),
}
EDIT = {"preserve_scale": 1.0, "lam": 5.0}  # of UCE, as `bench methods` chose it
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")  # of self- and cross-attention


@dataclass(frozen=True)
class _FusionRun:
    """What one run trained: its data, and the experts by the name of how they were trained."""

    model: DiffusionModel
    edited: DiffusionModel
    policy: Policy
    config: MethodsConfig
    made: TrainedExperts  # those with retained prompts
    experts: Mapping[str, Mapping[str, Path]]

    def system(self, name: str, variant: FusionVariant, folder: Path) -> System:
        """The variant, fused into ``folder``."""
        settings = dict(variant.settings)
        weight = float(settings.pop(WEIGHT, AT))
        chosen = list(self.experts[variant.experts].items())[variant.leave_out :]
        model = self.edited if variant.experts == EDITED else self.model
        adapter = merge_experts(
            model,
            [Expert(category, open_adapter(path), weight) for category, path in chosen],
            _all_of(self.made.pairs) if variant.experts == JOINT else self.made.pairs,
            folder,
            merge=MERGE,
            captions=self.made.cache.retained_prompts,
            edits=list(zip(*policy_concepts(self.policy, tuple(self.made.results)))) if variant.edits else (),
            options=settings,
            seed=self.config.align.seed,
            kept=folder.parent / "kept",
        )
        return adapter_system(model, adapter, self.config.sampling, name=name, description=variant.text)


def bench_fusion(
    world: World, model: DiffusionModel, out: Path, configs: Sequence[MethodsConfig], *, limit: int | None = None
) -> dict[str, Any]:
    """Train what is missing in ``out/run-N``, fuse and measure every variant over all runs; returns the evaluation's summary.

    Args: limit: At most so many test prompts of each run.
    Writes the fused adapters and ``evaluation``, with report and images, to ``out/fusion``. An unfinished call goes on.
    """
    policy, sampling = load_policy(world.policy), configs[0].sampling
    trained = configs[0].align.data.categories or policy.category_ids()
    seeds = tuple(config.align.seed for config in configs)
    suites = [world.suite(per_concept=configs[0].per_concept, seed=seed) for seed in seeds]
    parts = [of_categories(suite, trained).take(limit) for suite in suites]
    runs = [_train(world, model, policy, part, out / f"run-{i}", config) for i, (part, config) in enumerate(zip(parts, configs))]
    systems = [base_system(model, sampling)]
    for name, variant in VARIANTS.items():
        folders = [out / "fusion" / f"run-{number}" / name for number in range(len(runs))]
        systems.append(system_of_runs([run.system(name, variant, folder) for run, folder in zip(runs, folders)]))
    return evaluate(
        systems,
        suite_of_runs(parts),
        world_evaluators(world, world.oracle(), per_concept=configs[0].per_concept, seeds=seeds),
        out=out / "fusion" / "evaluation",
        sampling=sampling,
        report=ReportOptions(title=f"RegMean's settings on the shapes world, {len(configs)} runs"),
    )


def _train(world: World, model: DiffusionModel, policy: Policy, tests: Suite, out: Path, config: MethodsConfig) -> _FusionRun:
    source, oracle = GrammarSource(world.grammar()), world.oracle()
    made = train_on_policy(model, policy, source, out, config.align, pair_detector=oracle, suite=tests)
    recipe, categories = config.align.experts, tuple(made.results)
    free = recipe.changed(retain_weight=0.0)
    edited, cache = _edited(model, policy, made, out)
    experts = {
        PLAIN: train_experts(model, made.cache, out / PLAIN, free, categories=categories),
        ALL_LAYERS: train_experts(model, made.cache, out / ALL_LAYERS, free.changed(targets=PROJECTIONS), categories=categories),
        EDITED: train_experts(edited, cache, out / EDITED / "experts", free, categories=categories),
        RETAINED: made.results,
        JOINT: {JOINT: train_expert(model, made.cache, None, out / JOINT, config.joint(policy))},
    }
    paths = {name: {category: one.adapter for category, one in found.items()} for name, found in experts.items()}
    return _FusionRun(model, edited, policy, config, made, paths)


def _edited(model: DiffusionModel, policy: Policy, made: TrainedExperts, out: Path) -> tuple[DiffusionModel, LatentCache]:
    """The model with the categories' concepts moved to their counterparts, and the data as it encodes them.

    Both are made in ``out/edited``, or read from there.
    """
    captions, folder = made.cache.retained_prompts, out / EDITED
    edit = concept_edit(policy, tuple(made.results), guide="safe", preserve=tuple(captions), **EDIT)
    adapter = make_uce(model, edit, folder / "uce")
    if not (folder / "model").exists():
        fuse_adapter(Path(model.folder), adapter, folder / "model")
    edited = load_model(folder / "model", device=str(model.device))
    pairs = [pair for pair in made.pairs if pair.id in set(made.cache.ids)]
    images = out / "data" / "images"
    return edited, write_latents(edited, pairs, images, folder / "latents", retain=captions, flip=made.cache.has_flip)


def _all_of(pairs: Sequence[PromptPair]) -> list[PromptPair]:
    """The pairs as of one category, that of the joint adapter."""
    return [replace(pair, categories=(JOINT,)) for pair in pairs]
