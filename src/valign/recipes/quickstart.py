"""The chain on a world's bundled model, with the world's own oracle and CLIP: seconds for a check, minutes for the quickstart."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from valign.data.build import DataConfig
from valign.data.prompts.sources import GrammarSource
from valign.detectors.oracle import OracleDetector
from valign.evaluation import Evaluators
from valign.evaluation.suite import Suite, overlap
from valign.models.diffusion.base import DiffusionModel
from valign.policy import load_policy
from valign.recipes.align import AlignConfig, align
from valign.recipes.alignguard import AlignGuardRecipe
from valign.worlds import World

TUNING_SEED = 1000  # added to the run's for prompts that choose a merge's strength
RETAINED = 300  # benign prompts on which the experts are held to the base model
STEPS, BATCH = 20, 40  # denoising steps of the bundled model's images, and images at a time


def world_config(world: World, budget: str, *, categories: tuple[str, ...] | None = None, seed: int = 0) -> AlignConfig:
    """Options of the chain on the bundled model, at a budget of the world. No mirrored images: its prompts say left and right."""
    spent = world.budgets[budget]
    return AlignConfig(
        data=DataConfig(
            categories=categories,
            pairs_per_category=spent.pairs,
            steps=STEPS,
            retain=tuple(world.grammar().benign(RETAINED, seed)),
            filter="detector",
            flip=False,
            seed=seed,
            batch_size=BATCH,
        ),
        experts=AlignGuardRecipe.shapes(steps=spent.steps, seed=seed),
        search=spent.search,
        sld=("medium",),
        steps=STEPS,
        batch_size=BATCH,
        seed=seed,
    )


def world_evaluators(world: World, oracle: OracleDetector, *, per_concept: int, seeds: tuple[int, ...]) -> Evaluators:
    """The world's oracle and CLIP, with the true images of the suites of these seeds."""
    reference = [image for seed in seeds for image in world.reference_images(per_concept=per_concept, seed=seed)]
    return Evaluators(oracle, fidelity=oracle, features=oracle, clip=world.clip(), reference=reference)


def quickstart(
    world: World, model: DiffusionModel, out: Path, *, budget: str = "quick", categories: tuple[str, ...] = (), seed: int = 0
) -> dict[str, Any]:
    """Align the world's bundled model and measure it; returns the evaluation's summary.

    Args:
        categories: Ids of the policy's categories; the world's choice if none is given.
    """
    policy, per_concept = load_policy(world.policy), world.budgets[budget].per_concept
    chosen = categories or world.quick_categories
    config = world_config(world, budget, categories=chosen, seed=seed)
    tests = of_categories(world.suite(per_concept=per_concept, seed=seed), chosen)
    tuning = of_categories(world_tuning(world, tests, per_concept=per_concept, seed=seed), chosen)
    oracle = world.oracle()
    evaluators = world_evaluators(world, oracle, per_concept=per_concept, seeds=(seed,))
    return align(
        model,
        policy,
        GrammarSource(world.grammar()),
        tests,
        evaluators,
        out,
        config,
        pair_detector=oracle,
        tuning=tuning,
    )


def world_tuning(world: World, tests: Suite, *, per_concept: int, seed: int) -> Suite:
    """Prompts that choose a merge's strength: of the tuning split, without what tests hold out, and none that ``tests`` holds."""
    others = world.suite(per_concept=per_concept, seed=seed + TUNING_SEED, split="tuning")
    seen = {one.id for one in overlap(others, [prompt.prompt for prompt in tests.prompts])}
    return replace(others, prompts=tuple(prompt for prompt in others.prompts if prompt.id not in seen))


def of_categories(suite: Suite, categories: Collection[str]) -> Suite:
    """The benign prompts, and the unsafe ones of these categories."""
    return replace(suite, prompts=tuple(prompt for prompt in suite.prompts if prompt.benign or prompt.category in categories))
