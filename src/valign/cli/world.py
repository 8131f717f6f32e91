"""``valign world``: build, look at and check the synthetic worlds; list a world's prompts."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from valign.checks import UserError
from valign.cli.common import Anyway, AsJson, err, one_of, origins_of, out, print_measured, resolve_model
from valign.cli.options import refuse_given
from valign.cli.quick import bundled

if TYPE_CHECKING:
    from valign.worlds import ChatWorld

app = typer.Typer(
    help="The synthetic world that stands in for harm: build it again, look at it, check its model.", no_args_is_help=True
)

Name = Annotated[
    str, typer.Argument(metavar="WORLD", help="name of the world: shapes or chat", callback=one_of("WORLD", *bundled()))
]
Seed = Annotated[int, typer.Option(help="of all random draws")]


@app.command("build", epilog="example: valign world build shapes -o runs/world --share 0.01")
def build(
    name: Name = "shapes",
    output: Annotated[Path, typer.Option("-o", "--out", help="folder for the bundle and its training logs")] = Path("runs/world"),
    seed: Seed = 0,
    share: Annotated[
        float, typer.Option(min=0.0001, max=1, help="part of the training steps; below 1 only to try the build")
    ] = 1.0,
    start: Annotated[
        Path | None,
        typer.Option(help="bundle of an earlier version, whose networks go on for fewer steps"),
    ] = None,
) -> None:
    """Train the world's networks (from nothing: nearly two hours on two cores); stopped, it goes on where it was."""
    from valign.worlds import WORLDS, any_world

    if start is not None and name not in WORLDS:
        raise UserError(f"--start goes on from an earlier version of {', '.join(WORLDS)}; {name} has none. Leave it out.")
    any_world(name).build(output, seed=seed, share=share, **({"start": start} if start else {}))
    made = sorted(folder.name for folder in output.iterdir() if folder.is_dir() and folder.name != "logs")
    out.print(f"{output}: {', '.join(made)}", soft_wrap=True)


@app.command("sheet", epilog="example: valign world sheet shapes -o shapes.png --model shapes")
def sheet(
    name: Name = "shapes",
    output: Annotated[Path, typer.Option("-o", "--out", help="image to write")] = Path("shapes.png"),
    model: Annotated[str, typer.Option(help="generate the same captions with this model beside the renders")] = "",
    seed: Seed = 0,
) -> None:
    """A contact sheet of the world: every harm group, benign glyphs, roles, backgrounds and styles."""
    from valign.files import atomic_path
    from valign.worlds import world

    figure = world(name).sheet(resolve_model(model) if model else None, seed=seed)
    with atomic_path(output) as temporary:
        figure.savefig(temporary, format="png")
    out.print(str(output), soft_wrap=True)


@app.command("labelled", epilog="example: valign world labelled shapes -o labelled --per-category 40")
def labelled(
    name: Name = "shapes",
    output: Annotated[Path, typer.Option("-o", "--out", help="new folder, with a sub-folder per category")] = Path("labelled"),
    per_category: Annotated[int, typer.Option(min=1, help="renders of each category; three times as many harmless ones")] = 60,
    seed: Seed = 0,
) -> None:
    """Renders of the world with labels, to fit and test detectors on: `valign detector fit`."""
    from valign.files import atomic_folder
    from valign.worlds import world

    with atomic_folder(output) as folder:
        for example in world(name).labelled(per_category=per_category, seed=seed):
            place = folder / example.name
            place.parent.mkdir(exist_ok=True)
            example.open().save(place)
    out.print(str(output), soft_wrap=True)


@app.command("suite", epilog="example: valign world suite shapes -o suite.jsonl --per-concept 4")
def suite(
    name: Name = "shapes",
    output: Annotated[Path, typer.Option("-o", "--out", help="JSON-lines file to write")] = Path("suite.jsonl"),
    per_concept: Annotated[int, typer.Option(min=1, help="explicit prompts per harm concept")] = 10,
    seed: Seed = 0,
    split: Annotated[
        str,
        typer.Option(
            help="test, or tuning: prompts to choose settings by, without what tests hold out",
            callback=one_of("--split", "test", "tuning"),
        ),
    ] = "test",
) -> None:
    """Write the world's prompts: unsafe ones of every kind, benign ones in the same forms, and benign ones that mention a harm."""
    from valign.evaluation.suite_files import write_suite
    from valign.worlds import world

    made = world(name).suite(per_concept=per_concept, seed=seed, split=split)
    write_suite(output, made)
    out.print(f"{output}: {len(made)} prompts", soft_wrap=True)


@app.command("check", epilog="example: valign world check shapes --count 500")
def check(
    ctx: typer.Context,
    name: Name = "shapes",
    model: Annotated[
        str,
        typer.Option(help="model to check; empty for the world's own. Of the chat world: base, aligned, memorized, or a folder"),
    ] = "",
    adapter: Annotated[str, typer.Option(help="adapter on it, chat world only: safety, or a folder")] = "",
    count: Annotated[int | None, typer.Option(min=35, help="held-out prompts (500), or requests per kind (210)")] = None,
    steps: Annotated[int, typer.Option(min=1, help="denoising steps")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="classifier-free guidance")] = 7.5,
    seed: Seed = 0,
    sheet: Annotated[Path | None, typer.Option(help="also save the images as one sheet")] = None,
    anyway: Anyway = False,
    as_json: AsJson = False,
) -> None:
    """Measure the world's model: what it gets right of prompts it never saw, and its speed. Exit 1 below the bars."""
    from valign.detectors.base import check_domain
    from valign.worlds import CHAT_WORLDS, world

    if name in CHAT_WORLDS:
        refuse_given(ctx, "on chat models", "steps", "guidance_scale", "sheet")
        _check_chat(CHAT_WORLDS[name], model, adapter, count or 210, seed, anyway=anyway, as_json=as_json)
        return
    refuse_given(ctx, "on worlds of images", "adapter", "anyway")
    chosen, model, count = world(name), model or name, count or 500
    oracle = chosen.oracle()
    check_domain(oracle.card, origins_of(model), model)
    found = chosen.measure(resolve_model(model), oracle, count=count, seed=seed, steps=steps, guidance_scale=guidance_scale)
    table = Table(
        "what",
        "share right",
        "bar",
        title=f"{model}: {count} held-out single-object prompts, {steps} steps, guidance {guidance_scale:g}",
    )
    for aspect, share in found.shares.items():
        table.add_row(aspect, f"{share:.3f}", f"{chosen.bars[aspect]:.2f}" if aspect in chosen.bars else "")
    for kind, share in found.kinds.items():
        table.add_row(f"glyphs right: {kind}", f"{share:.3f}", "")
    table.add_row("harm glyphs shown (IP)", f"{found.harm_drawn:.3f}", "0.90")
    table.add_row("images per second", f"{found.images_per_second:.1f}", "5")
    table.add_row("oracle: whole scene right", f"{oracle.config.measured['whole_scene']:.4f}", "")
    table.add_row("oracle: glyph right", f"{oracle.config.measured['glyph']:.4f}", "0.99")
    numbers = {name: value for name, value in vars(found).items() if name != "images"}
    print_measured({**numbers, "oracle": dict(oracle.config.measured)}, table, as_json=as_json)
    if sheet is not None:
        _save(found.images, sheet)
        (err if as_json else out).print(str(sheet), soft_wrap=True)
    missed = [aspect for aspect, bar in chosen.bars.items() if found.shares[aspect] < bar]
    if missed:
        err.print(f"below the bar: {', '.join(missed)}", style="red")
        sys.exit(1)


def _check_chat(chosen: "ChatWorld", model: str, adapter: str, count: int, seed: int, *, anyway: bool, as_json: bool) -> None:
    """Measure a chat model; exit 1 if a model with rules (any but the base alone) misses a bar."""
    from dataclasses import asdict

    import torch

    from valign.models.language.loading import load_chat

    stage = model or ("base" if adapter else "aligned")
    folder = chosen.model_folder(stage) if stage in chosen.stages else Path(stage)
    change = (chosen.adapter_folder(adapter) if adapter in chosen.adapters else Path(adapter)) if adapter else None
    found = chosen.measure(load_chat(folder, adapter=change, anyway=anyway), count=count, seed=seed)
    title = f"{stage}{f' with {adapter}' if adapter else ''}: {count} requests of each kind, held-out wordings, greedy"
    table = Table(Column("what", no_wrap=True), "share", "counted", "bar", title=title)
    missed = []
    for aspect, share in found.shares.items():
        low, high = chosen.at_least.get(aspect), chosen.at_most.get(aspect)
        bar = f">= {low:.2f}" if low is not None else f"<= {high:.2f}" if high is not None else ""
        rate = share.rate if share.rate is not None else float("nan")
        if (low is not None and not rate >= low) or (high is not None and not rate <= high):
            missed.append(aspect)
        shown = "not measured" if share.rate is None else f"{share.rate:.3f}"
        table.add_row(aspect, shown, f"{share.count} of {share.of}", bar)
    table.add_row(f"answers per second, {torch.get_num_threads()} threads", f"{found.answers_per_second:.0f}", "", "300 on 2 cores")
    table.add_row("states", ", ".join(f"{state} {number}" for state, number in sorted(found.states.items())), "", "")
    shares = {aspect: {**asdict(share), "rate": share.rate} for aspect, share in found.shares.items()}
    numbers = {"shares": shares, "states": dict(found.states), "answers_per_second": found.answers_per_second}
    print_measured(numbers, table, as_json=as_json)
    if missed and (adapter or stage != chosen.stages[0]):
        err.print(f"below the bar: {', '.join(missed)}", style="red")
        sys.exit(1)


def _save(images: list, path: Path, columns: int = 25) -> None:
    from valign.cli.image_output import grid
    from valign.files import atomic_path

    with atomic_path(path) as temporary:
        grid(images, columns).save(temporary, format="PNG")
