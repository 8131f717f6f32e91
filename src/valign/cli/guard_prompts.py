"""What the commands of ``valign guard`` share: where their prompts come from, and how a result is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from valign.checks import UserError
from valign.cli.common import PromptTableOptions
from valign.cli.options import record

if TYPE_CHECKING:
    from valign.data.prompts.tables import TableReading

BLOCKED = 3  # exit code when a prompt is blocked; 1 is left to crashes, 2 to mistakes

Prompts = Annotated[list[str] | None, Argument(help="prompts; without any, one per line from stdin", show_default=False)]
PolicyName = Annotated[str, Option("--policy", "-p", help="default, shapes, or a policy file")]
File = Annotated[Path | None, Option("--file", "-f", help="prompts from a file: text (one a line), jsonl, csv or parquet")]
Json = Annotated[bool, Option("--json", help="one JSON object per prompt, on stdout")]


def given_prompts(ctx: typer.Context, prompts: list[str] | None, file: Path | None) -> Iterator[str]:
    """Prompts behind the command, of the file, or one per line of stdin. Raises: UserError for both, or none on a terminal."""
    from valign.data.prompts.records import choose_layout, prompt_texts
    from valign.data.prompts.tables import is_table, read_records, read_table

    if prompts and file is not None:
        raise UserError("Prompts must come from the command line or from --file, got both. Choose one.")
    if prompts:
        yield from prompts
    elif file is None:
        if sys.stdin.isatty():
            raise UserError("A prompt must be given, got none. Write it behind the command, or use --file, or a pipe.")
        yield from _lines(sys.stdin.buffer)
    elif is_table(file):
        layout, reading = table_layout(ctx)
        if choose_layout(read_table(file, reading), layout, file) == "plain":  # a cell that is not text is blocked, and no other
            yield from (row["prompt"] for _, row in read_records(file, ["prompt"], reading))
        else:
            yield from prompt_texts(file, layout, reading)
    else:
        with file.open("rb") as lines:
            yield from _lines(lines)


def _lines(file: Iterable[bytes]) -> Iterator[str]:
    """Lines but the empty ones. What is not UTF-8 stays broken, so that the guard refuses that line and no other."""
    texts = (line.decode("utf-8", "surrogateescape").rstrip("\r\n") for line in file)
    return (text for text in texts if text.strip())


def table_layout(ctx: typer.Context) -> tuple[str | None, TableReading]:
    """Layout and reading of the command's tables."""
    table = record(ctx, PromptTableOptions)
    return table.format, table.reading()


def print_line(value: dict[str, Any]) -> None:
    """One JSON object a line, on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False))
