"""LiVO: a value encoder for a frozen model, trained on images that keep and break a principle (arXiv 2410.12700)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from valign.checks import check_choice, option, refuse_idle, with_options
from valign.data.images.value_sets import ValueCache
from valign.methods import Method
from valign.models.diffusion.base import DiffusionModel
from valign.objectives import OBJECTIVES, DiffusionDPO, LiVO
from valign.training import PreferenceConfig, TrainResult
from valign.training.tasks.preference.values import train_values

METHOD = Method(
    slug="livo-recipe",
    title="LiVO's recipe: images, value encoder, inference",
    paper="arXiv 2410.12700",
    room="recipes",
    entry="valign.recipes.livo:train_livo",
    fidelity="variant",
    note="the authors' settings for Stable Diffusion 1.5; for miniatures other margins and rates, and factors instead "
    "of whole encoders",
)

SMALL_LATENT = 16  # latents of at most 16 x 16 are a miniature's, where the published numbers do not carry over


@dataclass(frozen=True, kw_only=True)
class LivoRecipe:
    """Hyper-parameters of one value encoder. The defaults are the authors', for Stable Diffusion 1.5."""

    objective: LiVO | DiffusionDPO = field(default_factory=LiVO)
    training: PreferenceConfig = field(
        default_factory=lambda: PreferenceConfig(
            learning_rate=1e-6,
            warmup_steps=0,
            pairs_per_step=8,
            steps=15_000,
            empty_prompt_prob=0.0,
            displacement_warn=0.5,  # the fresh token is a disturbance of its own: step 0 is not the reference
            displacement_stop=2.0,
            validate_every=500,
            patience=10,
            checkpoint_every=500,
        )
    )
    layout: str = option("reference", help="reference: prompt cut to 76 tokens, unpadded; padded: 77 tokens and the value's")
    lora_rank: int | None = option(
        None, help="train factors of this rank; the whole encoder, as the authors do, if left out", low=1
    )

    @classmethod
    def shapes(cls) -> LivoRecipe:
        """For miniatures of 64 pixels, found by trial on the shapes world: wider margins than the authors', few steps, a high rate.

        With margins of 1e-3 most pairs are satisfied, and teach nothing, before the images have changed; the winner's is so wide
        that it always teaches. Padded in training and sampling. No mirroring: the world's prompts say left and right.
        """
        return cls(objective=LiVO(beta=100.0, alpha=50.0, gamma_win=10.0), layout="padded").changed(
            learning_rate=3e-4, steps=300, flip=False, validate_every=50, patience=6, checkpoint_every=100, val_pairs=16
        )

    @classmethod
    def for_model(cls, model: DiffusionModel) -> LivoRecipe:
        """The preset of the model's size; the encoder itself stays float32."""
        base = cls.shapes() if max(model.latent_shape[1:]) <= SMALL_LATENT else cls()
        return base.changed(gradient_checkpointing=True) if model.family == "sdxl" else base

    def with_objective(self, name: str) -> LivoRecipe:
        """``"livo"`` or, to compare, ``"diffusion-dpo"``; one that it does not have yet comes with its own defaults."""
        check_choice("LivoRecipe.objective", name, OBJECTIVES)
        if isinstance(self.objective, OBJECTIVES[name]):
            return self
        return replace(self, objective=OBJECTIVES[name]())

    def changed(self, **changes: Any) -> LivoRecipe:
        """With other hyper-parameters of the objective, the training or the recipe, by name; None leaves one as it is."""
        own = {"layout", "lora_rank"}
        parts = {item.name for part in (self.objective, self.training, self.training.memory) for item in fields(part)}
        given = {name: value for name, value in changes.items() if value is not None}
        for name in given:
            check_choice("LivoRecipe option", name, sorted(own | parts))
        made = replace(
            self,
            objective=with_options(self.objective, given),
            training=self.training.changed(given),
            **{name: value for name, value in given.items() if name in own},
        )
        for part in (made.objective, made.training):
            refuse_idle(part, given)
        return made


def train_livo(
    model: DiffusionModel,
    cache: ValueCache,
    out: Path,
    recipe: LivoRecipe | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train the value encoder of all principles in ``cache`` into ``out/values``.

    Args:
        metadata: JSON-able provenance to store beside it, e.g. ``policy_hash``.
    Raises: UserError for what `valign.training.tasks.preference.values.train_values` refuses.
    """
    recipe = recipe or LivoRecipe.for_model(model)
    origin = {"recipe": "livo", "principles": [principle["id"] for principle in cache.principles], **(metadata or {})}
    return train_values(
        model,
        cache,
        out,
        recipe.training,
        recipe.objective,
        layout=recipe.layout,
        lora_rank=recipe.lora_rank,
        metadata=origin,
    )
