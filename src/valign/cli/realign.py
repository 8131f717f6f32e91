"""``valign realign``: give a drifted model its safety back by arithmetic on its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option, Typer
from typer.main import get_command

from valign.checks import UserError, option
from valign.cli.common import TableOptions, out, there
from valign.cli.options import TableGroup, configured, record
from valign.cli.quick import table_row

if TYPE_CHECKING:
    from valign.data.prompts.tables import TableReading
    from valign.merging.realign import Realignment

PAIRS = "of a chat model a table of prompt, chosen and rejected; of a diffusion model a folder as `valign train hysac` reads it"


class Realignments(TableGroup):
    """A command for each row of `valign.merging.realign.REALIGN`."""

    table = "valign.merging.realign:REALIGN"
    make = staticmethod(lambda name: realign_command(name))
    sketch = staticmethod(lambda name: _sketch(name))


app = Typer(no_args_is_help=True)


@app.callback(cls=Realignments)
def realign() -> None:
    """Give a drifted model its safety back, without its training data: for whole models (transformers, diffusers U-Nets) in shards
    of any size, and for LoRA adapters."""


@dataclass(frozen=True, kw_only=True)
class ResultOptions:
    """What is opened, and what is written."""

    start: str = option("aligned", help="what the fine-tunings started from", choices=("aligned", "base"))
    form: str = option(
        "auto", help="what is written; auto: an adapter of adapters, where it is exact", choices=("auto", "model", "adapter")
    )
    rank: int | None = option(None, help="rank of a written adapter; the error is reported", low=1)
    copy_resized: bool = option(False, help="take weights of another shape from the fine-tuned model as they are")
    allow_base_mismatch: bool = option(False, help="accept adapters whose records name different base models")
    shard_size: float = option(5.0, help="size of a file of weights, GB", above=0, rare=True)


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions:
    """What a mask is learned on."""

    pairs: Path | None = option(None, help=f"safety preferences: {PAIRS}")
    policy: str = option("default", help="policy whose categories the folder of a diffusion model names")
    max_tokens: int = option(512, help="of a chat; longer ones are refused", low=4, rare=True)
    device: str = option("auto", help="auto, cpu, cuda, ...")


LEARNING: Mapping[str, type[Any]] = {"learning": PreferenceOptions, "table": TableOptions}


def realign_command(name: str) -> Any:
    """The command of one realignment: its options come from the dataclass in the table."""
    from valign.merging.realign import REALIGN

    kind = REALIGN[name]
    parts = {"method": kind, "result": ResultOptions, **(LEARNING if kind.learns else {})}
    return _command(name, parts, help=(kind.__doc__ or "").split("\n")[0], epilog=f"example: valign realign {name} {kind.example}")


def _sketch(name: str) -> Any:
    """The command with all parts that one may have, none of them imported."""
    return _command(name, {"method": table_row(Realignments.table, name), "result": ResultOptions, **LEARNING})


def _command(name: str, parts: Mapping[str, Any], **told: str) -> Any:
    single = Typer(add_completion=False)
    single.command(name, cls=configured(**parts), **told)(_realign)  # type: ignore[arg-type]
    return get_command(single)


def _realign(
    ctx: Context,
    base: Annotated[str, Option(help="model before its safety training: a folder; any name where all others are its adapters")],
    aligned: Annotated[Path, Option(help="aligned model: a folder, or an adapter of the base")],
    finetuned: Annotated[list[Path], Option(help="drifted model or adapter; several follow each other, or repeat the option")],
    folder: Annotated[Path, Option("--out", "-o", help="new folder; a stopped call goes on when it is repeated")],
    more: Annotated[
        list[Path], Argument(metavar="[FINETUNED]...", help="further drifted models, with --fuse", callback=there())
    ] = [],  # noqa: B006
) -> None:
    from valign.merging.realign import REALIGN, open_realignment
    from valign.merging.realign import realign as run

    name = str(ctx.info_name)
    kind = REALIGN[name]
    method, result = record(ctx, kind), record(ctx, ResultOptions)
    opened = open_realignment(
        base,
        aligned,
        [*finetuned, *more],
        start=result.start,  # type: ignore[arg-type]
        copy_resized=result.copy_resized,
        allow_base_mismatch=result.allow_base_mismatch,
    )
    objective = None
    if kind.learns and getattr(method, "masks", None) is None:
        objective = _preferences(opened, record(ctx, PreferenceOptions), record(ctx, TableOptions).reading())
    made = run(
        method,
        opened,
        folder,
        name=name,
        form=result.form,  # type: ignore[arg-type]
        rank=result.rank,
        shard_size=round(result.shard_size * 1e9),
        objective=objective,
    )
    out.print_json(data={"result": str(folder), **_summary(made)})


def _summary(made: dict[str, Any]) -> dict[str, Any]:
    """What a method found per weight is in the record beside the result, not on the terminal."""
    return {name: value for name, value in made.items() if not isinstance(value, dict)}


def _preferences(opened: "Realignment", options: PreferenceOptions, reading: "TableReading") -> Any:
    """The rows, and the model at the fine-tunings' start. Raises: UserError without rows, or without the model."""
    from valign.merging.realign import load_preferences, read_preferences
    from valign.policy import load_policy

    if options.pairs is None:
        raise UserError(f"somf needs --pairs: {PAIRS}, or --masks of an earlier run.")
    rows = read_preferences(opened, options.pairs, known=load_policy(options.policy).category_ids(), reading=reading)
    return load_preferences(opened, rows, max_tokens=options.max_tokens, device=options.device)
