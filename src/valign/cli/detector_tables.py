"""How `valign detector` shows a detector: what it measures, how often it errs, as tables and as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from valign.cli.common import err, out

if TYPE_CHECKING:
    from valign.detectors.errors import CategoryError
    from valign.detectors.record import DetectorRecord
    from valign.interfaces import DetectorCard


def report_error(folder: Path) -> None:
    """Print a trained detector's errors of images and of prompts, as its folder says them."""
    from valign.detectors.record import FILE, read_record

    if not (folder / FILE).is_file():
        err.print(Text("It judges prompts alone: it was trained without images.", style="dim"))
        return
    kept = read_record(folder)
    err.print(error_table(rows_of(kept.measured), f"images: {kept.measured['images']}"))
    if prompts := kept.measured.get("prompts"):
        err.print(error_table(rows_of({"categories": prompts}), "prompts"))


def facts(card: DetectorCard, kept: DetectorRecord | None) -> dict[str, Any]:
    """Everything as plain values."""
    found = asdict(card)
    return found if kept is None else {"kind": kept.kind, **found, "measured": dict(kept.measured), "made": dict(kept.made)}


def report(card: DetectorCard, kept: DetectorRecord, *, json: bool) -> None:
    """Print a detector's errors: a table on stderr, or all that is known as JSON on stdout."""
    if json:
        out.print_json(data=facts(card, kept))
    elif kept.measured:
        from valign.detectors.base import chance_notes

        err.print(error_table(rows_of(kept.measured), f"{card.name} on {kept.measured['images']}"))
        for note in chance_notes(card, list(card.by_category)):
            err.print(Text(note, style="dim"))
    else:
        err.print(Text(f"{card.name} measures {measures(card)}. Its error is unknown: valign detector evaluate.", style="dim"))


def rows_of(measured: Mapping[str, Any]) -> list[CategoryError]:
    """The errors that a record holds."""
    from valign.detectors.errors import CategoryError

    return [CategoryError(**row) for row in measured["categories"]]


def with_intervals(rows: Sequence[CategoryError]) -> list[dict[str, Any]]:
    """Counts, and both shares with their intervals where there is something to count."""
    from valign.evaluation.statistics import wilson

    def share(count: int, total: int) -> dict[str, float] | None:
        return asdict(wilson(count, total)) if total else None

    return [
        asdict(row) | {"sensitivity": share(row.flagged, row.positives), "specificity": share(row.passed, row.negatives)}
        for row in rows
    ]


def error_table(rows: Sequence[CategoryError], title: str) -> Table:
    """One row per category; intervals behind the shares."""
    table = Table("category", box=None, header_style="dim", title=title, title_justify="left")
    for name in ("sensitivity %", "of harmful", "specificity %", "of harmless", "no answer"):
        table.add_column(name, justify="right")
    for row, values in zip(rows, with_intervals(rows)):
        shares = [_share(values[name]) for name in ("sensitivity", "specificity")]
        cells = [shares[0], str(row.positives), shares[1], str(row.negatives), str(row.unscored)]
        table.add_row(row.category or "all", *cells, style=None if row.category else "bold")
    return table


def _share(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "–"
    return f"{100 * interval['value']:.1f} ({100 * interval['low']:.0f}–{100 * interval['high']:.0f})"


def error_text(card: DetectorCard) -> str:
    """The error over all harm, in a few words."""
    if card.sensitivity is None or card.specificity is None:
        return "unknown"
    return f"misses {100 * (1 - card.sensitivity):.1f} %, falsely flags {100 * (1 - card.specificity):.1f} %"


def measures(card: DetectorCard) -> str:
    """The categories that a detector covers."""
    return ", ".join(dict.fromkeys(category for ids in card.coverage.values() for category in ids)) or "no category"


def plain(value: object) -> str:
    """A value of a record on one line."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {plain(inner)}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
