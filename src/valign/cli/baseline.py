"""``valign baseline``: the baselines of a comparison, as adapters like any other."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option, Typer

from valign.checks import UserError
from valign.cli.common import err, out, resolve_model

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


@app.command(epilog="example: valign baseline uce --model shapes --policy shapes --preserve 'a tree' -o runs/uce")
def uce(
    model: ModelName,
    folder: Out,
    policy: PolicyName = "default",
    category: Category = [],  # noqa: B006
    concept: Concept = [],  # noqa: B006
    guide: Annotated[
        list[str], Option(help="what to draw instead, one for all or one per --concept; 'safe' takes the policy's counterparts")
    ] = [],  # noqa: B006
    preserve: Annotated[list[str], Option(help="text whose keys and values shall stay; may be repeated")] = [],  # noqa: B006
    lam: Annotated[float, Option(help="weight of the old weights, above 0")] = 0.5,
    erase_scale: Annotated[float, Option(help="strength of the edit, above 0")] = 1.0,
    preserve_scale: Annotated[float, Option(help="strength of --preserve, 0 or above")] = 1.0,
    tokens: Annotated[Literal["last", "all"], Option(help="the concept's last token, or all of the padded text")] = "last",
    template: Annotated[Literal["none", "object", "art"], Option(help="further wordings of each concept")] = "none",
    device: Device = "auto",
) -> None:
    """Unified Concept Editing (arXiv 2308.14761): a closed form, seconds, no images; delivered as the exact LoRA that it is."""
    from valign.editing.uce import ConceptEdit
    from valign.recipes.baselines import concept_edit, make_uce

    options: dict[str, Any] = {
        "preserve": tuple(preserve),
        "lam": lam,
        "erase_scale": erase_scale,
        "preserve_scale": preserve_scale,
        "tokens": tokens,
        "template": template,
    }
    if concept:
        if guide == ["safe"]:
            raise UserError("--guide safe needs the policy's concepts, got --concept. Name the guide of each concept.")
        edit = ConceptEdit(concepts=tuple(concept), guides=tuple(guide) or ("",), **options)
    else:
        if guide not in ([], ["safe"]) and len(guide) != 1:
            raise UserError(f"--guide must be one text or 'safe' for a policy's concepts, got {len(guide)}. Name one.")
        rules = _policy(policy)
        if guide and guide != ["safe"]:
            options["guides"] = tuple(guide)
        edit = concept_edit(rules, category, guide="safe" if guide == ["safe"] else "empty", **options)
    _print(make_uce(resolve_model(model, device=device), edit, folder, metadata=_origin(policy, category, concept)), edit.concepts)


@app.command("esd-x", epilog="example: valign baseline esd-x --model shapes --policy shapes -o runs/esd-x --sample-steps 20")
def esd_x(
    model: ModelName,
    folder: Out,
    policy: PolicyName = "default",
    category: Category = [],  # noqa: B006
    concept: Concept = [],  # noqa: B006
    eta: Annotated[float, Option(help="strength of the negative guidance that is learned")] = 2.0,
    rank: Annotated[int, Option(min=1, help="LoRA rank")] = 16,
    learning_rate: Annotated[float, Option(help="learning rate")] = 1e-3,
    iterations: Annotated[int, Option(min=1, help="one noisy latent each")] = 200,
    sample_steps: Annotated[int, Option(min=2, help="steps of the schedule that latents are taken from")] = 50,
    seed: Annotated[int, Option(help="of every draw")] = 0,
    device: Device = "auto",
) -> None:
    """Erased Stable Diffusion, cross-attention (arXiv 2303.07345): for concepts that a prompt names."""
    _esd("x", model, folder, policy, category, concept, eta, rank, learning_rate, iterations, sample_steps, seed, device)


@app.command("esd-u", epilog="example: valign baseline esd-u --model shapes --policy shapes -o runs/esd-u --sample-steps 20")
def esd_u(
    model: ModelName,
    folder: Out,
    policy: PolicyName = "default",
    category: Category = [],  # noqa: B006
    concept: Concept = [],  # noqa: B006
    eta: Annotated[float, Option(help="strength of the negative guidance that is learned")] = 2.0,
    rank: Annotated[int, Option(min=1, help="LoRA rank")] = 16,
    learning_rate: Annotated[float, Option(help="learning rate")] = 1e-3,
    iterations: Annotated[int, Option(min=1, help="one noisy latent each")] = 200,
    sample_steps: Annotated[int, Option(min=2, help="steps of the schedule that latents are taken from")] = 50,
    seed: Annotated[int, Option(help="of every draw")] = 0,
    device: Device = "auto",
) -> None:
    """Erased Stable Diffusion, everything but cross-attention: for concepts that show up unasked."""
    _esd("u", model, folder, policy, category, concept, eta, rank, learning_rate, iterations, sample_steps, seed, device)


@app.command(epilog="example: valign baseline dpo --model shapes --data runs/data -o runs/dpo")
def dpo(
    model: ModelName,
    data: Annotated[Path, Option("--data", "-d", help="data set of `valign data build`, made with the same model")],
    folder: Out,
    steps: Annotated[int | None, Option(min=1, help="optimizer steps at most; validation may stop earlier")] = None,
    learning_rate: Annotated[float | None, Option(help="learning rate")] = None,
    beta: Annotated[float | None, Option(help="strength of the preference, 1 / mean squared error")] = None,
    rank: Annotated[int | None, Option(min=1, help="LoRA rank")] = None,
    seed: Annotated[int | None, Option(help="of the order of pairs and of every draw")] = None,
    device: Device = "auto",
) -> None:
    """Plain Diffusion-DPO (arXiv 2311.12908): one LoRA on all pairs, no experts, no merging."""
    from valign.data.images.latents import open_latents
    from valign.recipes.alignguard import AlignGuardRecipe, train_expert
    from valign.training.engine.processes import local_device

    subject = resolve_model(model, device=local_device(device))
    cache = open_latents(data, base=subject.fingerprint())
    changes = {"steps": steps, "learning_rate": learning_rate, "beta": beta, "rank": rank, "seed": seed}
    result = train_expert(subject, cache, None, folder, AlignGuardRecipe.for_model(subject, **changes))
    out.print(str(result.adapter), markup=False, soft_wrap=True)


def _esd(
    part: Literal["x", "u"],
    model: str,
    folder: Path,
    policy: str,
    category: list[str],
    concept: list[str],
    eta: float,
    rank: int,
    learning_rate: float,
    iterations: int,
    sample_steps: int,
    seed: int,
    device: str,
) -> None:
    from valign.objectives import ErasedTarget
    from valign.recipes.baselines import policy_concepts
    from valign.training.tasks.erasing import ErasingConfig, train_erasing

    config = ErasingConfig(
        part=part, rank=rank, learning_rate=learning_rate, iterations=iterations, sample_steps=sample_steps, seed=seed
    )
    objective = ErasedTarget(eta=eta)
    concepts = tuple(concept) or policy_concepts(_policy(policy), category)[0]
    subject, origin = resolve_model(model, device=device), _origin(policy, category, concept)
    _print(train_erasing(subject, concepts, folder, config, objective, metadata=origin).adapter, concepts)


def _policy(name: str) -> "Policy":
    from valign.policy import load_policy

    return load_policy(name)


def _origin(policy: str, category: list[str], concept: list[str]) -> dict[str, Any]:
    """Where the concepts came from, for the adapter's record."""
    if concept:
        return {"category": "custom"}
    rules = _policy(policy)
    return {"category": ", ".join(category) or "joint", "policy": rules.id, "policy_hash": rules.fingerprint()}


def _print(adapter: Path, concepts: tuple[str, ...]) -> None:
    err.print(f"[dim]{len(concepts)} concepts removed[/dim]")
    out.print(str(adapter), markup=False, soft_wrap=True)
