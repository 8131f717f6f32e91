"""Progress with an ETA, on stderr, for every long loop: bars on a terminal, elsewhere a line a minute."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


def plain_console(*, stderr: bool) -> Console:
    """A console that prints paths and texts as they are: neither brackets, colons nor numbers mean anything."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


console = plain_console(stderr=True)


LINE_EVERY = 60.0  # seconds between two lines, where no bar is drawn


def wanted() -> bool:
    """Whether anything is said of progress: unless ``VALIGN_PROGRESS=0``, which ``--quiet`` sets."""
    return os.environ.get("VALIGN_PROGRESS", "1") != "0"


def shown() -> bool:
    """Whether bars are drawn: on a terminal, if progress is `wanted`."""
    return wanted() and sys.stderr.isatty()


def track(items: Iterable[T], what: str, *, total: int | None = None, done: int = 0) -> Iterator[T]:
    """Yield ``items`` under a bar, or with a line a minute off a terminal.

    ``total`` counts those already ``done`` as well (a resumed run starts in the middle).
    """
    if total is None and isinstance(items, Sized):
        total = done + len(items)
    if wanted() and not shown():
        yield from _with_lines(items, what, total, done)
        return
    what_column = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(what_column, *columns, console=console, disable=not shown(), transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        for item in items:
            yield item
            bar.advance(task)


def _with_lines(items: Iterable[T], what: str, total: int | None, done: int) -> Iterator[T]:
    start = said = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        if (now := time.monotonic()) - said >= LINE_EVERY:
            said = now
            console.print(progress_line(what, done + number, total, rate=number / (now - start)), soft_wrap=True)


def progress_line(what: str, done: int, total: int | None, *, rate: float) -> str:
    """Phase, step, rate (per second) and time left: ``training: 120 of 400, 2.5 s each, 0:11:40 left``."""
    speed = f"{rate:.3g} per second" if rate >= 1 else f"{1 / rate:.3g} s each"
    if total is None:
        return f"{what}: {done}, {speed}"
    return f"{what}: {done} of {total}, {speed}, {timedelta(seconds=round((total - done) / rate))} left"
