"""What `bench_methods` trains in one run: AlignGuard, plain DPO, UCE, ESD and LiVO, each with what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from valign.data.build import DataConfig, build_data
from valign.data.images.value_sets import ValueDataConfig, build_values
from valign.data.prompts.pairs import load_pairs
from valign.data.prompts.sources import GrammarSource
from valign.detectors.oracle import OracleDetector
from valign.experiments.shapes_budgets import LIVO_STEPS, PER_CONCEPT, Budget, shapes_config
from valign.files import read_json
from valign.merging import Expert
from valign.models.diffusion.base import DiffusionModel
from valign.models.files.adapter_files import open_adapter
from valign.policy import Policy
from valign.recipes.align import AlignConfig
from valign.recipes.alignguard import JOINT, AlignGuardRecipe, train_expert, train_experts
from valign.recipes.baselines import concept_edit, make_uce, policy_concepts
from valign.recipes.livo import LivoRecipe, train_livo
from valign.recipes.merged import merge_experts
from valign.training.tasks.erasing import ErasingConfig, train_erasing
from valign.worlds.shapes import Grammar
from valign.worlds.shapes.contrast import HeadContrast

CURVE = 8  # checkpoints that the curves of DPO and LiVO are drawn from
KEEP_ALL = 10_000
LIVO = "livo"


@dataclass(frozen=True, kw_only=True)
class MethodsConfig:
    """What one run of the comparison spends; its seed is ``align.seed``."""

    align: AlignConfig
    values: ValueDataConfig
    livo: LivoRecipe
    esd: ErasingConfig
    per_concept: int  # explicit test prompts; see `valign.worlds.shapes.suite`
    role_images: int = 50  # per prompt that bias is measured on, as the authors of LiVO have
    curve: int = CURVE

    @property
    def drawing(self) -> dict[str, Any]:
        """How every system draws."""
        return {"steps": self.align.steps, "guidance_scale": self.align.guidance_scale, "batch_size": self.align.batch_size}

    def joint(self, policy: Policy) -> AlignGuardRecipe:
        """Plain DPO: as many steps on all pairs as all experts together have, with the checkpoints of a curve."""
        steps = self.align.experts.training.steps * len(self.align.data.categories or policy.category_ids())
        return self.align.experts.changed(steps=steps, checkpoint_every=self.every(steps), keep_checkpoints=KEEP_ALL)

    def every(self, steps: int) -> int:
        """Steps between the checkpoints of a curve."""
        return max(1, steps // self.curve)


def methods_config(budget: Budget, *, seed: int = 0) -> MethodsConfig:
    """The bundled model's sizes of one run."""
    return MethodsConfig(
        align=shapes_config(budget, seed=seed),
        values=ValueDataConfig(
            images=1 if budget == "small" else 8, steps=20, filter="judge", flip=False, seed=seed, batch_size=40
        ),
        livo=LivoRecipe.shapes().changed(steps=LIVO_STEPS[budget], seed=seed),
        esd=ErasingConfig(iterations=10 if budget == "small" else 200, sample_steps=20, seed=seed),
        per_concept=PER_CONCEPT[budget],
        role_images={"small": 4, "quick": 24, "full": 50}[budget],
    )


@dataclass(frozen=True)
class Made:
    """One method's result and price. ``steps`` are optimizer steps, 0 for a closed form."""

    folder: Path
    parameters: int  # trained, or solved for
    steps: int
    seconds: float  # of training alone, without data


def train_methods(
    model: DiffusionModel, policy: Policy, oracle: OracleDetector, out: Path, config: MethodsConfig
) -> dict[str, Made]:
    """Train everything of one run into ``out``, or go on: alignguard, dpo, uce, livo, esd-x, esd-u."""
    data: DataConfig = config.align.data
    cache = build_data(model, policy, GrammarSource(Grammar()), out / "data", data, detector=oracle)
    pairs = load_pairs(out / "data" / "prompts" / "pairs.parquet")
    categories = data.categories or policy.category_ids()
    trained = train_experts(model, cache, out / "experts", config.align.experts, categories=categories)
    experts = [Expert(name, open_adapter(result.adapter), config.align.strength) for name, result in trained.items()]
    merged = merge_experts(model, experts, pairs, out / "merged", per_category=config.align.calibration, seed=config.align.seed)
    joint = train_expert(model, cache, None, out / JOINT, config.joint(policy))
    values = build_values(model, policy, out / "values", config.values, detector=oracle, contrast=HeadContrast(oracle), pairs=pairs)
    every = config.every(config.livo.training.steps)
    livo = train_livo(model, values, out / LIVO, config.livo.changed(checkpoint_every=every, keep_checkpoints=KEEP_ALL))
    made = {
        "alignguard": Made(
            merged,
            sum(_parameters(result.adapter) for result in trained.values()),
            sum(result.steps for result in trained.values()),
            sum(result.seconds for result in trained.values()),
        ),
        "dpo": Made(joint.adapter, _parameters(joint.adapter), joint.steps, joint.seconds),
        "uce": _uce(model, policy, categories, out / "uce"),
        "livo": Made(livo.adapter, read_json(livo.adapter / "value_encoder.json")["parameters"], livo.steps, livo.seconds),
    }
    for part in ("x", "u"):
        erasing = replace(config.esd, part=part)
        done = train_erasing(model, policy_concepts(policy, categories)[0], out / f"esd-{part}", erasing)
        made[f"esd-{part}"] = Made(done.adapter, done.parameters, done.iterations, done.seconds)
    return made


def _uce(model: DiffusionModel, policy: Policy, categories: Sequence[str], out: Path) -> Made:
    """Each concept onto its safe counterpart, as AlignGuard's and LiVO's data have it."""
    folder = make_uce(model, concept_edit(policy, categories, guide="safe"), out)
    return Made(folder, _parameters(folder), 0, read_json(out / "run.json")["results"]["seconds"])


def _parameters(adapter: Path) -> int:
    return sum(lora.down.numel() + lora.up.numel() for _, lora in open_adapter(adapter).items())
