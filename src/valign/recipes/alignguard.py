"""AlignGuard's experts: one LoRA per harm category, trained by Diffusion-DPO to prefer the safe image (arXiv 2412.10493).

caption = unsafe prompt, winner = image of its safe counterpart, loser = image of the unsafe prompt.
The chain around it is in `align`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from valign.checks import check_choice, refuse_idle, with_options
from valign.data.images.latents import LatentCache
from valign.methods import Method
from valign.models.diffusion.base import DiffusionModel
from valign.objectives import DiffusionDPO
from valign.objectives.robust.look_ahead import LookAhead
from valign.progress import console
from valign.training import PreferenceConfig, TrainResult, train_preference

METHOD = Method(
    slug="alignguard-experts",
    title="AlignGuard's experts: one LoRA per harm category",
    paper="arXiv 2412.10493",
    room="recipes",
    entry="valign.recipes.alignguard:train_experts",
    fidelity="variant",
    note="the authors' launchers' settings for full-size models; the loss on benign prompts is not public, retained rows are ours",
)

JOINT = "joint"  # name of the one adapter trained on all categories at once, "All-single" in the paper
PUSH_LIMIT = 4.0  # learning rate times beta; the settings known to hold have 0.05 (SDXL), 0.8 (SD 1.5) and 2 (miniature)
SMALL_LATENT = 16  # latents of at most 16 x 16 are a miniature's, where the published numbers do not carry over


@dataclass(frozen=True, kw_only=True)
class AlignGuardRecipe:
    """Hyper-parameters of one expert. The defaults are for Stable Diffusion 1.x and 2.x; see `for_model`."""

    objective: DiffusionDPO = field(default_factory=DiffusionDPO)
    training: PreferenceConfig = field(
        default_factory=lambda: PreferenceConfig(learning_rate=1.6e-4, warmup_steps=500, empty_prompt_prob=0.2)
    )
    look_ahead: LookAhead | None = None  # ResAlign: safety that survives benign fine-tuning

    @classmethod
    def sdxl(cls, **changes: Any) -> AlignGuardRecipe:
        """Adafactor at a fixed 1e-5 without warm-up, checkpointed activations, 4 x 4 pairs (the authors' launcher)."""
        base = cls().changed(optimizer="adafactor", learning_rate=1e-5, warmup_steps=0, accumulation=4, gradient_checkpointing=True)
        return base.changed(**changes)

    @classmethod
    def shapes(cls, **changes: Any) -> AlignGuardRecipe:
        """For miniatures of 64 pixels, found by trial on the shapes world: DPO alone is displaced there, so winners are held down.

        Keys and values of cross-attention only: they read the prompt and nothing else, so experts of several categories stay out
        of each other's way when merged (on all projections, Co-Merge of seven leaves seven times the explicit harm, and loses
        benign images). A high rate, and benign prompts held firmly: so an expert is strong where it is meant to be, and nowhere
        else. The empty caption is never trained, it is held too. No mirroring: the world's prompts say left and right.
        """
        training = PreferenceConfig(
            rank=8,
            targets=("attn2.to_k", "attn2.to_v"),
            learning_rate=3e-3,
            warmup_steps=0,
            decay="cosine",
            steps=200,
            sft_weight=20.0,
            retain_weight=1000.0,
            empty_prompt_prob=0.0,
            flip=False,
            max_drift=0.5,
            patience=10,
            validate_every=10,
            checkpoint_every=50,
            val_pairs=16,
        )
        return cls(objective=DiffusionDPO(beta=1000.0), training=training).changed(**changes)

    @classmethod
    def for_model(cls, model: DiffusionModel, **changes: Any) -> AlignGuardRecipe:
        """The preset of the model's family and size."""
        if max(model.latent_shape[1:]) <= SMALL_LATENT:
            base = cls.shapes()
        else:
            base = cls.sdxl() if model.family == "sdxl" else cls()
        return base.changed(**changes)

    def changed(self, **changes: Any) -> AlignGuardRecipe:
        """With other hyper-parameters of the objective or the training, by name; None leaves one as it is.

        Raises: UserError for one that has no effect beside the others.
        """
        known = {item.name for part in (self.objective, self.training, self.training.memory) for item in fields(part)}
        given = {name: value for name, value in changes.items() if value is not None}
        for name in given:
            check_choice("AlignGuardRecipe option", name, sorted(known))
        made = replace(self, objective=with_options(self.objective, given), training=self.training.changed(given))
        for part in (made.objective, made.training):
            refuse_idle(part, given)
        return made

    def warnings(self) -> list[str]:
        """What is likely to go wrong with these numbers, in sentences."""
        push = self.training.learning_rate * self.objective.beta
        if push <= PUSH_LIMIT:
            return []
        return [
            f"learning_rate x beta is {push:g}; settings known to hold stay below {PUSH_LIMIT:g}. "
            "Expect displaced winners: lower the learning rate, or set sft_weight or winner_safeguard."
        ]


def train_expert(
    model: DiffusionModel,
    cache: LatentCache,
    category: str | None,
    out: Path,
    recipe: AlignGuardRecipe | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train the expert of ``category`` on all pairs that carry it; None trains one joint adapter on every pair.

    Args:
        metadata: JSON-able provenance to store in the adapter, e.g. ``policy_hash``.
    Raises: UserError if the data hold no pair of ``category`` (the message names the categories they hold).
    """
    recipe = recipe or AlignGuardRecipe.for_model(model)
    for warning in recipe.warnings():
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    rows, name = cache.rows(category), category or JOINT
    origin = {"recipe": "alignguard", "category": name, "pairs": len(rows), **(metadata or {})}
    return train_preference(
        model,
        cache,
        rows,
        out,
        recipe.training,
        recipe.objective,
        metadata=origin,
        look_ahead=recipe.look_ahead,
        label=f"train {name}",
    )


def train_experts(
    model: DiffusionModel,
    cache: LatentCache,
    out: Path,
    recipe: AlignGuardRecipe | None = None,
    *,
    categories: Sequence[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, TrainResult]:
    """Train one expert per category into ``out/<category>``; None takes every category that has data, in sorted order.

    All start from the same down factors (one ``init_seed``), as merging wants them. Finished experts are not trained again.
    Raises: UserError, before any training, if one of ``categories`` has no data.
    """
    names = categories if categories is not None else sorted({name for has in cache.categories for name in has})
    for name in names:
        cache.rows(name)
    return {name: train_expert(model, cache, name, out / name, recipe, metadata=metadata) for name in names}
