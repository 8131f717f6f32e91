"""Progress bars with an ETA, on stderr, for every long loop; silent when nobody watches."""

import os
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


def plain_console(*, stderr: bool) -> Console:
    """A console that prints paths and texts as they are: neither brackets, colons nor numbers mean anything."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


console = plain_console(stderr=True)


def shown() -> bool:
    """Whether bars are drawn: on a terminal, unless ``VALIGN_PROGRESS=0``."""
    return os.environ.get("VALIGN_PROGRESS", "1") != "0" and sys.stderr.isatty()


def track(items: Iterable[T], what: str, *, total: int | None = None, done: int = 0) -> Iterator[T]:
    """Yield ``items`` under a bar. ``total`` counts those already ``done`` as well (a resumed run starts in the middle)."""
    what_column = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(what_column, *columns, console=console, disable=not shown(), transient=True) as bar:
        if total is None and isinstance(items, Sized):
            total = done + len(items)
        task = bar.add_task(what, total=total, completed=done)
        for item in items:
            yield item
            bar.advance(task)
