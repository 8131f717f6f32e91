"""``valign align`` and ``valign quickstart``: the whole chain from policy to report."""

from pathlib import Path
from typing import Annotated

from typer import Context, Option

from valign.checks import UserError, check_choice
from valign.cli.common import (
    err,
    example,
    out,
    resolve_clip,
    resolve_detector,
    resolve_fidelity,
    resolve_model,
    resolve_suite,
)
from valign.cli.data import Retain, SourceOptions, read_retained
from valign.cli.options import configured, record

Budget = Annotated[str, Option(help="small (a minute, proves nothing), quick (minutes) or full (7 experts: --category for each)")]


@example("valign quickstart -o runs/quickstart")
def quickstart(
    folder: Annotated[Path, Option("--out", "-o", help="folder of the run; an unfinished one is resumed")] = Path(
        "runs/quickstart"
    ),
    categories: Annotated[
        list[str], Option("--categories", "--category", help="category to align; may be repeated; three if left out")
    ] = [],  # noqa: B006
    budget: Budget = "quick",
    seed: Annotated[int, Option(help="of every draw in the run")] = 0,
) -> None:
    """Align the bundled miniature model and see the proof: the whole chain in minutes, on a laptop's CPU."""
    from valign.cli.evaluate import print_summary
    from valign.policy import load_policy
    from valign.recipes.quickstart import quickstart as run
    from valign.worlds import world

    shapes = world("shapes")
    check_choice("budget", budget, shapes.budgets)
    policy = load_policy(shapes.policy)
    chosen = tuple(policy.category(name).id for name in categories)
    summary = run(shapes, resolve_model(shapes.name), folder, budget=budget, categories=chosen, seed=seed)
    print_summary(summary, folder / "evaluation")
    sheet = folder / "data" / "images" / "contact_sheet.png"
    err.print(f"[dim]the adapter: {folder / 'merged' / 'adapter'}   its training pairs: {sheet}[/dim]")


@example(
    "valign align --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts pairs.csv --detector nudenet -o runs/sd15",
    cls=configured(source=SourceOptions),
)
def command(
    ctx: Context,
    model: Annotated[str, Option("--model", "-m", help="the model to align: shapes, a pipeline folder or a hub id")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of the run; an unfinished one is resumed")],
    policy: Annotated[str, Option("--policy", "-p", help="a bundled policy (default, shapes) or a YAML file")] = "default",
    detector: Annotated[
        str, Option(help="who judges the images: oracle, nudenet, safety-checker=FOLDER, clip-probe=FOLDER; joined by +")
    ] = "",
    suite: Annotated[str, Option(help="test prompts: shapes, or a JSON-lines file; from the policy's concepts if left out")] = "",
    limit: Annotated[int | None, Option(min=1, help="test prompts at most")] = None,
    fidelity: Annotated[str, Option(help="who tells whether benign images are right: oracle or none")] = "none",
    clip: Annotated[str, Option(help="CLIP for CLIPScore and drift: shapes, a folder, or none")] = "none",
    category: Annotated[list[str], Option(help="only this category; may be repeated")] = [],  # noqa: B006
    pairs: Annotated[int, Option(min=1, help="prompt pairs per category")] = 100,
    train_steps: Annotated[int | None, Option(min=1, help="optimizer steps per expert; the family's own if left out")] = None,
    learning_rate: Annotated[float | None, Option(help="of the experts; the family's own if left out")] = None,
    steps: Annotated[int, Option(min=1, help="denoising steps of every image")] = 50,
    guidance_scale: Annotated[float, Option(help="classifier-free guidance scale")] = 7.5,
    retain: Retain = None,
    retain_weight: Annotated[
        float | None, Option(min=0, help="how firmly images of the benign prompts are kept; the family's own if left out")
    ] = None,
    merge: Annotated[str, Option(help="of the experts: co-merge, sum, mean, ties or dare-ties")] = "co-merge",
    strength: Annotated[float, Option(min=0, help="weight of every expert in the merge; above 1 it reaches further")] = 1.0,
    filter: Annotated[str, Option(help="none, or detector: train only on pairs that the detector tells apart")] = "none",
    flip: Annotated[bool, Option(help="train on mirrored images too; off where left and right matter")] = True,
    batch_size: Annotated[int, Option(min=1, help="images at a time")] = 8,
    seed: Annotated[int, Option(help="of every draw in the run")] = 0,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Align a model to a policy and measure it: data, experts, merge, evaluation, report. Run it again to resume."""
    from valign.cli.evaluate import print_summary
    from valign.data.build import DataConfig
    from valign.evaluation import Evaluators
    from valign.evaluation.policy_suite import policy_suite
    from valign.policy import load_policy
    from valign.recipes.align import AlignConfig, align
    from valign.recipes.alignguard import AlignGuardRecipe
    from valign.recipes.merged import merges_without_scores

    if not detector:
        raise UserError(
            "--detector must name who judges the images, got nothing. Name one: oracle, nudenet, safety-checker=FOLDER ..."
        )
    check_choice("--merge", merge, merges_without_scores())
    rules = load_policy(policy)
    source = record(ctx, SourceOptions).open(rules)
    tested = resolve_suite(suite) if suite else policy_suite(rules)
    judge, reader, encoder = resolve_detector(detector), resolve_fidelity(fidelity), resolve_clip(clip)
    subject = resolve_model(model, device=device)
    config = AlignConfig(
        data=DataConfig(
            categories=tuple(rules.category(name).id for name in category) or None,
            pairs_per_category=pairs,
            steps=steps,
            guidance_scale=guidance_scale,
            retain=read_retained(retain, rules),
            filter=filter,  # type: ignore[arg-type]
            flip=flip,
            seed=seed,
            batch_size=batch_size,
        ),
        experts=AlignGuardRecipe.for_model(
            subject, steps=train_steps, learning_rate=learning_rate, retain_weight=retain_weight, flip=flip, seed=seed
        ),
        merge=merge,
        strength=strength,
        steps=steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        seed=seed,
    )
    evaluators = Evaluators(judge, fidelity=reader, clip=encoder)
    summary = align(subject, rules, source, tested.take(limit), evaluators, folder, config, pair_detector=judge)
    print_summary(summary, folder / "evaluation")
    out.print(str(folder / "merged" / "adapter"), markup=False)
