"""``valign baseline``: the baselines of a comparison, as adapters like any other."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Context, Option, Typer

from valign.checks import UserError, refuse_idle
from valign.cli.common import err, out, resolve_model
from valign.cli.early import refuse_categories
from valign.cli.options import changes, configured, record

if TYPE_CHECKING:
    from valign.policy import Policy

app = Typer(
    no_args_is_help=True,
    help="Concept-removal baselines for a fair comparison: UCE, ESD-x, ESD-u, one joint DPO adapter. Negative prompt and Safe "
    "Latent Diffusion need no adapter: see `valign evaluate`.",
)

ModelName = Annotated[str, Option("--model", "-m", help="shapes, a pipeline folder or a hub id")]
Out = Annotated[Path, Option("--out", "-o", help="folder of the run; the adapter is OUT/adapter. The same command resumes")]
PolicyName = Annotated[str, Option("--policy", "-p", help="its concepts are removed: default, shapes or a YAML file")]
Category = Annotated[list[str], Option(help="only this category's concepts; may be repeated")]
Concept = Annotated[list[str], Option(help="remove this instead of the policy's concepts; may be repeated")]
Device = Annotated[str, Option(help="auto, cpu, cuda, ...")]


@app.command(
    cls=configured(pipeline=True, early=lambda params, _: _refuse_early(params), edit="valign.editing.uce:ConceptEdit"),
    epilog="example: valign baseline uce --model shapes --policy shapes --preserve 'a tree' -o runs/uce",
)
def uce(
    ctx: Context,
    model: ModelName,
    folder: Out,
    policy: PolicyName = "default",
    category: Category = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """Unified Concept Editing (arXiv 2308.14761): a closed form, seconds, no images; delivered as the exact LoRA that it is."""
    from valign.editing.uce import ConceptEdit
    from valign.recipes.baselines import concept_edit, make_uce

    given = changes(ctx, ConceptEdit)
    guides, safe = given.get("guides", ()), given.get("guides") == ("safe",)
    if given.get("concepts"):
        if safe:
            raise UserError("--guide safe needs the policy's concepts, got --concept. Name the guide of each concept.")
        edit = ConceptEdit(**given)
    else:
        if len(guides) > 1:
            raise UserError(f"--guide must be one text or 'safe' for a policy's concepts, got {len(guides)}. Name one.")
        options = {name: value for name, value in given.items() if name != "guides" or not safe}
        edit = concept_edit(_policy(policy), category, guide="safe" if safe else "empty", **options)
    refuse_idle(edit, given)
    origin = _origin(policy, category, given.get("concepts"))
    _print(make_uce(resolve_model(model, device=device), edit, folder, metadata=origin), edit.concepts)


def _esd(part: Literal["x", "u"], help_: str) -> None:
    """Register the command of one variant of ESD."""
    name = f"esd-{part}"

    @app.command(
        name,
        cls=configured(
            pipeline=True,
            early=lambda params, _: _refuse_early(params),
            erasing="valign.training.tasks.erasing:ErasingConfig",
            objective="valign.objectives:ErasedTarget",
        ),
        help=help_,
        epilog=f"example: valign baseline {name} --model shapes --policy shapes -o runs/{name} --sample-steps 20",
    )
    def command(
        ctx: Context,
        model: ModelName,
        folder: Out,
        policy: PolicyName = "default",
        category: Category = [],  # noqa: B006
        concept: Concept = [],  # noqa: B006
        device: Device = "auto",
    ) -> None:
        from valign.objectives import ErasedTarget
        from valign.recipes.baselines import policy_concepts
        from valign.training.tasks.erasing import ErasingConfig, train_erasing

        config, objective = record(ctx, ErasingConfig, part=part), record(ctx, ErasedTarget)
        concepts = tuple(concept) or policy_concepts(_policy(policy), category)[0]
        subject, origin = resolve_model(model, device=device), _origin(policy, category, concept)
        _print(train_erasing(subject, concepts, folder, config, objective, metadata=origin).adapter, concepts)


_esd("x", "Erased Stable Diffusion, cross-attention (arXiv 2303.07345): for concepts that a prompt names.")
_esd("u", "Erased Stable Diffusion, everything but cross-attention: for concepts that show up unasked.")


@app.command(
    cls=configured(
        pipeline=True,
        preset=True,
        training="valign.training.tasks.preference.config:PreferenceConfig",
        objective="valign.objectives:DiffusionDPO",
        typed={"training": ("steps", "learning_rate", "rank", "seed"), "objective": ("beta",)},
    ),
    epilog="example: valign baseline dpo --model shapes --data runs/data -o runs/dpo",
)
def dpo(
    ctx: Context,
    model: ModelName,
    data: Annotated[Path, Option("--data", "-d", help="data set of `valign data build`, made with the same model")],
    folder: Out,
    device: Device = "auto",
) -> None:
    """Plain Diffusion-DPO (arXiv 2311.12908): one LoRA on all pairs, no experts, no merging."""
    from valign.data.images.latents import open_latents
    from valign.objectives import DiffusionDPO
    from valign.recipes.alignguard import AlignGuardRecipe, train_expert
    from valign.training import PreferenceConfig
    from valign.training.engine.processes import local_device

    subject = resolve_model(model, device=local_device(device))
    cache = open_latents(data, base=subject.fingerprint())
    recipe = AlignGuardRecipe.for_model(subject, **changes(ctx, PreferenceConfig, DiffusionDPO))
    out.print(str(train_expert(subject, cache, None, folder, recipe).adapter), soft_wrap=True)


def _refuse_early(params: Mapping[str, Any]) -> None:
    refuse_categories(params["policy"], params["category"])


def _policy(name: str) -> "Policy":
    from valign.policy import load_policy

    return load_policy(name)


def _origin(policy: str, category: list[str], concepts: Any) -> dict[str, Any]:
    """Where the concepts came from, for the adapter's record."""
    if concepts:
        return {"category": "custom"}
    rules = _policy(policy)
    return {"category": ", ".join(category) or "joint", "policy": rules.id, "policy_hash": rules.fingerprint()}


def _print(adapter: Path, concepts: tuple[str, ...]) -> None:
    err.print(f"{len(concepts)} concepts removed", style="dim")
    out.print(str(adapter), soft_wrap=True)
