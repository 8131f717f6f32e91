"""What `bench_methods` trains in one run: AlignGuard's experts, plain DPO, ESD and LiVO, each with what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from valign.data.images.value_sets import ValueDataConfig, build_values
from valign.data.prompts.sources import GrammarSource, Source
from valign.detectors import Detector
from valign.detectors.oracle import OracleDetector
from valign.evaluation import Suite
from valign.files import read_json
from valign.interfaces import SamplingConfig
from valign.models.diffusion.base import DiffusionModel
from valign.models.files.adapter_files import open_adapter
from valign.policy import Policy, load_policy
from valign.recipes.align import AlignConfig, TrainedExperts, train_on_policy
from valign.recipes.alignguard import JOINT, AlignGuardRecipe, train_expert
from valign.recipes.baselines import policy_concepts
from valign.recipes.livo import LivoRecipe, train_livo
from valign.recipes.quickstart import BATCH, STEPS, world_config
from valign.recipes.retriever import train_retriever
from valign.training import TrainResult
from valign.training.tasks.erasing import ErasingConfig, train_erasing
from valign.worlds import World

CURVE = 8  # checkpoints on the curves of DPO and LiVO
KEEP_ALL = 10_000
EXPERTS, DPO, LIVO, RETRIEVER = "experts", "dpo", "livo", "retriever"


@dataclass(frozen=True, kw_only=True)
class ComparedConfig:
    """What one run of a comparison spends on methods that any model can have; its seed is ``align.seed``."""

    align: AlignConfig
    esd: ErasingConfig
    curve: int = CURVE

    @property
    def sampling(self) -> SamplingConfig:
        """How every system samples its images."""
        return replace(SamplingConfig.of(self.align), seed=0)  # every run has seeds of its own

    def joint(self, policy: Policy) -> AlignGuardRecipe:
        """Plain DPO: as many steps on all pairs as all experts together have, with the checkpoints of a curve."""
        steps = self.align.experts.training.steps * len(self.align.data.categories or policy.category_ids())
        return self.align.experts.changed(steps=steps, checkpoint_every=self.every(steps), keep_checkpoints=KEEP_ALL)

    def every(self, steps: int) -> int:
        """Steps between the checkpoints of a curve."""
        return max(1, steps // self.curve)


@dataclass(frozen=True, kw_only=True)
class MethodsConfig(ComparedConfig):
    """What one run of the comparison on a world spends."""

    values: ValueDataConfig
    livo: LivoRecipe
    per_concept: int  # explicit test prompts; see `valign.worlds.shapes.suite`
    role_images: int = 50  # per prompt that bias is measured on, as the authors of LiVO have


def methods_config(world: World, budget: str, *, categories: tuple[str, ...] = (), seed: int = 0) -> MethodsConfig:
    """The sizes of one run on the world's bundled model.

    Experts retain benign prompts, so that any merge can take them; DPO and ESD have as many steps as all experts together.

    Args: categories: Ids of the policy's; all if none is given. LiVO learns their principles and those of no category.
    """
    spent, policy = world.budgets[budget], load_policy(world.policy)
    align = world_config(world, budget, categories=categories or None, seed=seed)
    steps = align.experts.training.steps * len(categories or policy.category_ids())
    taught = tuple(one.id for one in policy.principles if one.category in (None, *categories)) if categories else None
    return MethodsConfig(
        align=align,
        values=ValueDataConfig(
            principles=taught, images=spent.value_images, steps=STEPS, filter="judge", flip=False, seed=seed, batch_size=BATCH
        ),
        livo=LivoRecipe.shapes().changed(steps=spent.value_steps, seed=seed),
        esd=ErasingConfig(iterations=steps, sample_steps=STEPS, seed=seed),
        per_concept=spent.per_concept,
        role_images=spent.role_images,
    )


@dataclass(frozen=True)
class Made:
    """One method's result and price. ``steps`` are optimizer steps, 0 for a closed form."""

    folder: Path
    parameters: int  # trained, or solved for
    steps: int
    seconds: float  # of training alone, without data


@dataclass(frozen=True)
class Trained:
    """What one run trained: the experts, which merges start from, and everything with its price, by name."""

    experts: TrainedExperts
    made: dict[str, Made]


def train_methods(
    world: World, model: DiffusionModel, policy: Policy, oracle: OracleDetector, out: Path, config: MethodsConfig
) -> Trained:
    """Train everything of one run into ``out``, or go on: experts, dpo, livo and its retriever, esd-x, esd-u."""
    experts = train_on_policy(model, policy, GrammarSource(world.grammar()), out, config.align, pair_detector=oracle)
    categories, pairs = tuple(experts.results), experts.pairs
    joint = train_expert(model, experts.cache, None, out / JOINT, config.joint(policy))
    values = build_values(
        model, policy, out / "values", config.values, detector=oracle, contrast=world.contrast(oracle), pairs=pairs
    )
    every = config.every(config.livo.training.steps)
    livo = train_livo(model, values, out / LIVO, config.livo.changed(checkpoint_every=every, keep_checkpoints=KEEP_ALL))
    probe = train_retriever(model, pairs, config.align.data.retain, policy, out / RETRIEVER)
    made = {
        EXPERTS: _made_by(out / EXPERTS, list(experts.results.values())),
        DPO: _made_by(joint.adapter, [joint]),
        "livo": Made(livo.adapter, read_json(livo.adapter / "value_encoder.json")["parameters"], livo.steps, livo.seconds),
        RETRIEVER: Made(out / RETRIEVER, probe.weight.numel() + probe.bias.numel(), 0, _seconds(out / RETRIEVER)),
    }
    return Trained(experts, made | _erased(model, policy, categories, out, config))


def train_compared(
    model: DiffusionModel, policy: Policy, source: Source, out: Path, config: ComparedConfig, *, detector: Detector, suite: Suite
) -> Trained:
    """`train_methods` without what needs a world: experts, dpo, esd-x, esd-u.

    Args: detector: Filters the image pairs, where the configuration asks for it. suite: Test prompts, refused in the data.
    """
    experts = train_on_policy(model, policy, source, out, config.align, pair_detector=detector, suite=suite)
    data = replace(config.align.data, categories=tuple(experts.results))  # those that have pairs
    spent = replace(config, align=replace(config.align, data=data))
    joint = train_expert(model, experts.cache, None, out / JOINT, spent.joint(policy))
    made = {EXPERTS: _made_by(out / EXPERTS, list(experts.results.values())), DPO: _made_by(joint.adapter, [joint])}
    return Trained(experts, made | _erased(model, policy, tuple(experts.results), out, config))


def _made_by(folder: Path, results: Sequence[TrainResult]) -> Made:
    """What trainings on pairs made together."""
    parameters = sum(_parameters(result.adapter) for result in results)
    return Made(folder, parameters, sum(result.steps for result in results), sum(result.seconds for result in results))


def _erased(model: DiffusionModel, policy: Policy, categories: Sequence[str], out: Path, config: ComparedConfig) -> dict[str, Made]:
    """Both parts of ESD, on all concepts of the categories."""
    made = {}
    for part in ("x", "u"):
        erasing = replace(config.esd, part=part)
        done = train_erasing(model, policy_concepts(policy, categories)[0], out / f"esd-{part}", erasing)
        made[f"esd-{part}"] = Made(done.adapter, done.parameters, done.iterations, done.seconds)
    return made


def _seconds(run: Path) -> float:
    return float(read_json(run / "run.json")["results"]["seconds"])


def _parameters(adapter: Path) -> int:
    return sum(lora.down.numel() + lora.up.numel() for _, lora in open_adapter(adapter).items())
