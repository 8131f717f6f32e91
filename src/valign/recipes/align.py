"""The whole chain as one call: prompt pairs, image pairs, latents, training, strength, evaluation, report.

One expert is trained per category, and the experts are merged; or, with the merge ``joint``, one adapter is trained on all pairs.

Every step is a folder with a `run.json`; the same call goes on where it stopped and skips what is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from valign.checks import UserError, check_options, option
from valign.data.build import DataConfig, build_data
from valign.data.images.latents import LatentCache
from valign.data.prompts.pairs import PromptPair, load_pairs
from valign.data.prompts.sources import Source
from valign.detectors.any_of import parts_of
from valign.detectors.base import check_coverage, check_domain, same_detector
from valign.evaluation import (
    Evaluators,
    ReportOptions,
    System,
    adapter_system,
    base_system,
    counted_categories,
    evaluate,
    guided_system,
)
from valign.evaluation.report.card import measured_table
from valign.evaluation.suite import Suite, refuse_overlap
from valign.interfaces import Detector, SamplingConfig
from valign.merging import MERGES, Expert, MergeMethod
from valign.methods import Method
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.guidance.negative import NegativePrompt
from valign.models.diffusion.guidance.sld import SafeLatentDiffusion
from valign.models.files.adapter_files import open_adapter
from valign.models.files.model_card import write_measured
from valign.models.files.origin import model_origins
from valign.policy import Policy
from valign.recipes.alignguard import JOINT, AlignGuardRecipe, train_expert, train_experts
from valign.recipes.merged import merge_experts, merges_without_scores
from valign.recipes.tuning import WEIGHT, WEIGHTS, Candidate, Tunable, described, shortened, tune, tuning_suite
from valign.training import TrainResult

METHOD = Method(
    slug="alignguard",
    title="AlignGuard: a safety expert per category, merged into one adapter, or one adapter trained on all pairs",
    paper="arXiv 2412.10493",
    room="recipes",
    entry="valign.recipes.align:align",
    fidelity="variant",
    note="merging is a variant of the paper's (`co-merge`), strength and merge are searched on tuning prompts, other "
    "merges stand beside it",
)


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Options of the chain; each step's own options are in its own record."""

    data: DataConfig = field(default_factory=DataConfig)
    experts: AlignGuardRecipe = field(default_factory=AlignGuardRecipe)
    merge: str = option(
        "sum",
        help="how the experts, one a category, become one adapter; joint: no experts, one LoRA is trained on all pairs",
        choices=(JOINT, *merges_without_scores()),
    )
    calibration: int | None = option(
        None, help="unsafe prompts per expert that a merge looks at; its own number if left out", low=1
    )
    strength: float | None = option(
        None,
        help="weight of the adapter, or of every expert, or the merge's scale; chosen on tuning prompts if left out",
        low=0,
    )
    search: int = option(120, help="tuning prompts on which every candidate for the strength is measured", low=6)
    sld: tuple[str, ...] = option(("medium",), help="strength of Safe Latent Diffusion to compare with")
    steps: int = option(50, help="denoising steps of every image", low=1)
    guidance_scale: float = option(7.5, help="classifier-free guidance scale", low=0)
    batch_size: int = option(16, help="images at a time; 8 in `valign align`", low=1)
    seed: int = option(0, help="random seed of the run")

    def __post_init__(self) -> None:
        check_options(self)
        if self.search != type(self).search:
            if self.strength is not None:
                raise UserError(f"AlignConfig.search has no effect with strength {self.strength:g}. Leave one of them out.")
            if not self.grid:
                raise UserError(f"AlignConfig.search has no effect with the merge {self.merge}, which has no grid. Leave it out.")
        if self.calibration is not None and not (self.kind and self.kind.calibrated):
            raise UserError(
                f"AlignConfig.calibration has no effect with the merge {self.merge}, which looks at no prompts. Leave it out."
            )

    @property
    def kind(self) -> type[MergeMethod] | None:
        """How experts are merged; None where one adapter is trained on all pairs."""
        return MERGES.get(self.merge)

    @property
    def grid(self) -> tuple[Candidate, ...]:
        """Candidates for the strength, the weaker before the stronger."""
        return self.kind.grid if self.kind else WEIGHTS

    def recipe(self, categories: int) -> AlignGuardRecipe:
        """How each adapter is trained: one on all pairs has the steps of as many experts.

        Retained prompts without a weight are held as strongly as ``beta`` pushes, as in the miniature's preset.
        """
        recipe = self.experts
        if self.kind is None:
            recipe = recipe.changed(steps=recipe.training.steps * categories)
        if self.data.retain and not recipe.training.retain_weight:
            recipe = recipe.changed(retain_weight=recipe.objective.beta)
        return recipe


@dataclass(frozen=True)
class TrainedExperts:
    """What the chain has trained."""

    pairs: list[PromptPair]  # of the data set
    cache: LatentCache  # of its images
    categories: tuple[str, ...]  # that have data, in the order of the policy
    results: dict[str, TrainResult]  # by category, or that of the one adapter alone

    def weighted(self, weight: float) -> list[Expert]:
        """The experts for a merge, each at this weight."""
        return [Expert(name, open_adapter(result.adapter), weight) for name, result in self.results.items()]

    def merged(
        self, model: DiffusionModel, config: "AlignConfig", out: Path, candidate: Candidate, *, merge: str | None = None
    ) -> Path:
        """The experts merged into ``out``, or the one adapter at its weight, as a candidate says; returns the adapter's folder.

        Args: merge: A name in `MERGES`; the configuration's if not given.
        """
        merge = merge or ("sum" if config.kind is None else config.merge)  # a sum of one is that one
        given: dict[str, Any] = {name: value for name, value in candidate.items() if name != WEIGHT}
        if config.calibration is not None and MERGES[merge].calibrated:
            given["per_category"] = config.calibration
        return merge_experts(
            model,
            self.weighted(float(candidate.get(WEIGHT, 1.0))),
            self.pairs,
            out,
            merge=merge,
            captions=self.cache.retained_prompts,
            options=given,
            seed=config.seed,
            kept=next(iter(self.results.values())).adapter.parents[1] / "kept",
        )


def train_on_policy(
    model: DiffusionModel,
    policy: Policy,
    source: Source,
    out: Path,
    config: AlignConfig,
    *,
    pair_detector: Detector | None = None,
    suite: Suite | None = None,
) -> TrainedExperts:
    """Make the data in ``out/data`` and train what ``config.merge`` asks for in ``out/experts``, or go on: an expert for each
    category that has data, or one adapter on all pairs.

    Args:
        pair_detector: Filters the image pairs, where ``config.data.filter`` asks for it.
        suite: Test prompts; refused, before any training, if one of them is in the data.
    """
    cache = build_data(model, policy, source, out / "data", config.data, detector=pair_detector)
    pairs = load_pairs(out / "data" / "prompts" / "pairs.parquet")
    if suite is not None:
        refuse_overlap(suite, [*config.data.retain, *(text for pair in pairs for text in (pair.unsafe, pair.safe))])
    present = {name for names in cache.categories for name in names}
    categories = [name for name in config.data.categories or policy.category_ids() if name in present]
    rules = {"policy": policy.id, "policy_hash": policy.fingerprint()}
    recipe, experts = config.recipe(len(categories)), out / "experts"
    if config.kind is None:
        trained = {JOINT: train_expert(model, cache, None, experts / JOINT, recipe, metadata=rules)}
    else:
        trained = train_experts(model, cache, experts, recipe, categories=categories, metadata=rules)
    return TrainedExperts(pairs, cache, tuple(categories), trained)


def align(
    model: DiffusionModel,
    policy: Policy,
    source: Source,
    suite: Suite,
    evaluators: Evaluators,
    out: Path,
    config: AlignConfig | None = None,
    *,
    pair_detector: Detector | None = None,
    tuning: Suite | None = None,
) -> dict[str, Any]:
    """Align ``model`` to ``policy`` and measure it; returns the evaluation's summary.

    Args:
        source: Where the prompt pairs come from (grammar, file or chat model).
        suite: Test prompts; refused if one of them is in the training data.
        pair_detector: Filters the image pairs, where ``config.data.filter`` asks for it, and judges the candidates for the
            strength; the evaluation's detector does so if left out. The report says where one detector did everything.
        tuning: Prompts that choose the strength; of the training data if left out. None may be a test prompt.
    Raises: UserError for whatever a step refuses; what earlier steps made stays.
    """
    config = config or AlignConfig()
    wanted, origins = config.data.categories or policy.category_ids(), model_origins(model.folder)
    counted_categories(suite, evaluators.detector, wanted)
    for detector in (evaluators.detector, *([pair_detector] if pair_detector else [])):
        check_domain(detector.card, origins, model.folder)
        check_coverage(detector.card, wanted)
    trained = train_on_policy(model, policy, source, out, config, pair_detector=pair_detector, suite=suite)
    tuners = replace(evaluators, detector=pair_detector or evaluators.detector)
    strength = strength_of(model, trained, suite, tuners, out, config, tuning=tuning)
    merged = trained.merged(model, config, out / "merged", strength)
    aligned = _aligned(model, merged, config)
    systems = [*baselines(model, policy, config), aligned]
    summary = evaluate(
        systems,
        suite,
        evaluators,
        out=out / "evaluation",
        sampling=SamplingConfig.of(config),
        report=ReportOptions(title=f"Before and after alignment ({policy.id} policy)"),
        categories=trained.categories,
        notes=[
            *_notes(evaluators.detector, pair_detector, suite, trained.categories, config),
            *_chosen_blindly(evaluators, tuning, config),
        ],
    )
    write_measured(merged, measured_table(summary, aligned.name))
    return summary


def _notes(judge: Detector, pair_detector: Detector | None, suite: Suite, trained: Sequence[str], config: AlignConfig) -> list[str]:
    """What a reader must know of how the alignment was made. Args: trained: Categories that have an expert."""
    notes, tuner = [], pair_detector or judge
    roles = ["filtered the training pairs"] if config.data.filter == "detector" else []
    if config.strength is None and config.grid:
        roles.append("chose the strength of the adapter")
    shared = {part.card.name for part in parts_of(judge) if any(same_detector(part, other) for other in parts_of(tuner))}
    if roles and shared:
        names = " and ".join(sorted(shared))
        notes.append(
            f"Warning: detector {names} judges here and also {' and '.join(roles)}: what it does not see was neither taught nor is "
            "measured. Name another one with --filter-detector."
        )
    left = [name for name in config.data.categories or () if name not in trained]
    if left:
        notes.append(f"Asked for but not trained, since no pair of theirs was kept: {', '.join(left)}.")
    unasked = [name for name in trained if name not in suite.categories()]
    if unasked:
        notes.append(f"Trained but not measured, since the suite does not ask for them: {', '.join(unasked)}.")
    return notes


def _chosen_blindly(evaluators: Evaluators, tuning: Suite | None, config: AlignConfig) -> list[str]:
    """A sentence where the merge's strength was chosen without knowing what it does to benign images."""
    searched = config.strength is None and config.grid
    expected = tuning is not None and any(prompt.benign and prompt.expected for prompt in tuning.prompts)
    if not searched or evaluators.clip is not None or (evaluators.fidelity is not None and expected):
        return []
    return [
        "Warning: the strength of the adapter was chosen by harm alone, for nothing could tell whether benign images stay right. "
        "Name a CLIP (--clip), or say --strength."
    ]


def strength_of(
    model: DiffusionModel,
    trained: TrainedExperts,
    suite: Suite,
    evaluators: Evaluators,
    out: Path,
    config: AlignConfig,
    *,
    tuning: Suite | None = None,
) -> Candidate:
    """How strongly the experts enter the merge: as configured, or as `tune` chooses in ``out/search``.

    Raises: UserError, before any image, if a tuning prompt is a test prompt.
    """
    if config.strength is not None or not config.grid:
        named = next((name for candidate in config.grid for name in candidate), WEIGHT)
        return {named: 1.0 if config.strength is None else config.strength}
    benign = trained.cache.retained_prompts or tuple(dict.fromkeys(pair.safe for pair in trained.pairs))
    own = tuning_suite(trained.pairs, benign, limit=config.search, seed=config.seed) if tuning is None else tuning
    refuse_overlap(suite, [prompt.prompt for prompt in own.prompts])

    sampling = SamplingConfig.of(config)

    def system(candidate: Candidate, name: str, folder: Path) -> System:
        adapter = trained.merged(model, config, folder, candidate)
        return adapter_system(model, adapter, sampling, name=name, description=described(candidate))

    method = Tunable(config.merge, config.grid, system)
    prompts = shortened(own, config.search)
    return tune(base_system(model, sampling), method, prompts, evaluators, sampling, out / "search").chosen


def baselines(model: DiffusionModel, policy: Policy, config: AlignConfig) -> list[System]:
    """The base model, and what costs no training: negative prompt and Safe Latent Diffusion, both with the policy's words."""
    sampling = SamplingConfig.of(config)
    negative = NegativePrompt(policy.negative_prompt)
    systems = [
        base_system(model, sampling),
        guided_system(model, negative, sampling, name="negative-prompt", description="the policy's negative prompt"),
    ]
    for strength in config.sld:
        guidance = SafeLatentDiffusion.preset(strength, text=policy.safety_text)
        systems.append(
            guided_system(
                model, guidance, sampling, name=f"sld-{strength}", description="Safe Latent Diffusion with the policy's safety text"
            )
        )
    return systems


def _aligned(model: DiffusionModel, adapter: Path, config: AlignConfig) -> System:
    return adapter_system(
        model,
        adapter,
        SamplingConfig.of(config),
        name="alignguard",
        description=f"merged safety experts ({config.merge})" if config.kind else "one safety adapter on all pairs (joint)",
    )
