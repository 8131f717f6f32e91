"""``valign compare``: many methods, tasks and seeds under one budget."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from rich.text import Text
from typer import Option, Typer

from valign.checks import UserError
from valign.cli.common import AsJson, checked, err, one_of, print_measured, setting
from valign.cli.early import refuse_encoder

app = Typer(no_args_is_help=True, help="Compare methods fairly: seeds, intervals, paired tests, retention, cost.")


@app.callback()
def compare() -> None:
    """Compare methods fairly: seeds, intervals, paired tests, retention, cost."""


@app.command(
    epilog="example: valign compare adapters --methods lora,ailora --tasks sst2,mrpc --seeds 0-2 --data glue -o runs/adapters "
    "  all of them: valign compare adapters --data glue -o runs/adapters "
    "  on CLIP: valign compare adapters --tasks glyphs,glyph-stream --methods lora,codyra -o runs/clip"
)
def adapters(
    folder: Annotated[Path, Option("--out", "-o", help="folder of the runs; only what is missing or failed is done")],
    data: Annotated[
        Path | None,
        Option("--data", "-d", help="folder with glue_cola, ... as documented; the shapes world's tasks need none"),
    ] = None,
    methods: Annotated[str, Option(help="names joined by commas, as in valign finetune; empty is all")] = "",
    tasks: Annotated[
        str,
        Option(help="of cola, sst2, mrpc, rte, stsb, cifar10, mnist, glyphs, glyph-stream, counterparts, expert, joined by commas"),
    ] = "cola,sst2,mrpc,rte,stsb",
    seeds: Annotated[str, Option(help="numbers joined by commas, or a span such as 0-4")] = "0-2",
    budget: Annotated[
        str,
        Option(help="tiny (tries the path, proves nothing), quick or full", callback=one_of("--budget", "tiny", "quick", "full")),
    ] = "quick",
    model: Annotated[
        str,
        Option(
            "--model",
            "-m",
            help="minilm, or a folder or hub id of a transformers encoder",
            callback=checked(refuse_encoder, "--model"),
        ),
    ] = "minilm",
    set_: Annotated[
        list[str], Option("--set", metavar="METHOD:NAME=VALUE", help="an option of one method, e.g. lora:rank=4; may be repeated")
    ] = [],  # noqa: B006
    rates: Annotated[
        str, Option(help="factors on the learning rates, e.g. 0.3,1,3: each method and task takes the best on training rows")
    ] = "1",
    overhead: Annotated[bool, Option("--overhead/--no-overhead", help="measure memory and time per step, paired with LoRA")] = True,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Train every method on every task with every seed, and report scores, retention and cost with paired tests."""
    from valign.evaluation.adapters.page import spread
    from valign.experiments.adapters.compare import Comparison, all_methods, compare_adapters
    from valign.experiments.adapters.settings import BUDGETS

    comparison = Comparison(
        model=model,
        data=data,
        bases=folder / "bases",
        methods=tuple(filter(None, methods.split(","))) or all_methods(),
        tasks=tuple(filter(None, tasks.split(","))),
        seeds=parse_seeds(seeds),
        budget=BUDGETS[budget],
        rates=parse_rates(rates),
        settings=parse_settings(map(setting, set_)),
        device=device,
    )
    summary = compare_adapters(comparison, folder, overhead=overhead)
    table = Table("method", "mean score", "against LoRA", "drift", "trained", "step", box=None, header_style="bold")
    for row in sorted(summary["rows"], key=lambda row: -row["score"]["value"]):
        test = row["against"].get("lora")
        table.add_row(
            row["method"],
            spread(row["score"]),
            f"{test['difference']['value']:+.3f}, p = {test['p']:.2g}" if test else "-",
            f"{row['drift']['value']:.4f}",
            f"{row['trained']:,}",
            f"{row['cost']['step_ratio']:.2f}" if row["cost"] else "-",
        )
    err.print(table)
    err.print(Text(summary["best"]["text"], style="bold"))
    print_measured(summary, str(folder / "report.html"), as_json=as_json)


def parse_settings(texts: Iterable[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    """``("lora:rank", 4)`` -> ``{"lora": {"rank": 4}}``.

    Raises: UserError for a name without a method.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, value in texts:
        method, separator, option = name.partition(":")
        if not (method and separator and option):
            raise UserError(f"--set must be METHOD:NAME=VALUE, got {name!r}. Example: --set lora:rank=4")
        found.setdefault(method, {})[option] = value
    return found


def parse_rates(text: str) -> tuple[float, ...]:
    """``"0.3,1,3"``. Raises: UserError for anything else."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise UserError(f"--rates must be factors like 0.3,1,3, got {text!r}.") from None


def parse_seeds(text: str) -> tuple[int, ...]:
    """``"0,1,2"`` or ``"0-4"``. Raises: UserError for anything else."""
    span = re.fullmatch(r"(\d+)-(\d+)", text)
    if span and int(span[1]) <= int(span[2]):
        return tuple(range(int(span[1]), int(span[2]) + 1))
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"--seeds must be numbers like 0,1,2 or a span like 0-4, got {text!r}.")
    return tuple(map(int, text.split(",")))
