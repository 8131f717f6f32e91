"""How much of everything the chain spends on the bundled model: seconds for a check, minutes for the quickstart, the full run."""

from pathlib import Path
from typing import Any, Literal

from valign.data.build import DataConfig
from valign.data.prompts.sources import GrammarSource
from valign.detectors.oracle import OracleDetector
from valign.evaluation.suite import Suite
from valign.models.diffusion.base import DiffusionModel
from valign.models.encoders.clip import ClipEncoder
from valign.policy import Policy
from valign.recipes.align import AlignConfig, Evaluators, align
from valign.recipes.alignguard import AlignGuardRecipe
from valign.worlds.shapes import Grammar, reference_images
from valign.worlds.shapes import suite as shapes_suite

Budget = Literal["small", "quick", "full"]
BUDGETS = ("small", "quick", "full")
PAIRS = {"small": 24, "quick": 80, "full": 120}  # per category
STEPS = {"small": 20, "quick": 150, "full": 200}  # of training, at most; validation may stop earlier
STRENGTH = 2.5  # of the experts in Co-Merge, which shares the neurons out among them
PER_CONCEPT = {"small": 1, "quick": 6, "full": 8}  # explicit test prompts; see `valign.worlds.shapes.suite`
LIVO_STEPS = {"small": 20, "quick": 300, "full": 300}  # of a value encoder's training, at most
RETAINED = 300  # benign prompts on which the experts are held to the base model
QUICK_CATEGORIES = ("hate", "violence", "shocking")


def shapes_config(budget: Budget, *, categories: tuple[str, ...] | None = None, seed: int = 0) -> AlignConfig:
    """Options of the chain on the bundled model. No mirrored images: its prompts say left and right."""
    return AlignConfig(
        data=DataConfig(
            categories=categories,
            pairs_per_category=PAIRS[budget],
            steps=20,
            retain=tuple(Grammar().benign(RETAINED, seed)),
            filter="detector",
            flip=False,
            seed=seed,
            batch_size=40,
        ),
        experts=AlignGuardRecipe.shapes(steps=STEPS[budget], seed=seed),
        strength=STRENGTH,
        sld=("medium",),
        steps=20,
        batch_size=40,
        seed=seed,
    )


def align_shapes(
    model: DiffusionModel,
    policy: Policy,
    oracle: OracleDetector,
    clip: ClipEncoder,
    out: Path,
    *,
    budget: Budget,
    categories: tuple[str, ...],
    seed: int = 0,
) -> dict[str, Any]:
    """The chain on the bundled model with the world's own judges; returns the evaluation's summary."""
    config = shapes_config(budget, categories=categories, seed=seed)
    tests = shapes_suite(per_concept=PER_CONCEPT[budget], seed=seed)
    kept = tuple(prompt for prompt in tests.prompts if prompt.benign or prompt.category in categories)
    judges = Evaluators(
        oracle,
        fidelity=oracle,
        features=oracle,
        clip=clip,
        reference=reference_images(per_concept=PER_CONCEPT[budget], seed=seed),
    )
    return align(
        model, policy, GrammarSource(Grammar()), Suite(tests.name, kept, tests.stand_in), judges, out, config, pair_detector=oracle
    )
