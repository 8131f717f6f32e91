"""The numbers of an evaluation's ``summary.json`` as tables for other programs: CSV, parquet, LaTeX."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from valign.checks import UserError, close_to
from valign.files import atomic_path, read_json

COLUMNS = ("system", "measure", "value", "low", "high")
ESCAPES = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"}


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary in the folder of an evaluation, or of a run that has one. Raises: UserError if there is none."""
    for path in (folder / "summary.json", folder / "evaluation" / "summary.json"):
        if path.is_file():
            found: dict[str, Any] = read_json(path)
            return found
    raise UserError(f"{folder} must hold a summary.json of `valign evaluate`, got none. Name the folder of an evaluation.")


def rows_of(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per system and measured number: ``system``, ``measure`` (its path in the summary), ``value``, ``low``, ``high``.

    The limits are of the interval, None where there is none. What was not measured has no row.
    """
    return [
        {"system": system["name"], "measure": measure, **numbers}
        for system in summary["systems"]
        for measure, numbers in _numbers({name: value for name, value in system.items() if name not in ("name", "description")})
    ]


def _numbers(found: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, float | None]]]:
    if isinstance(found, bool) or found is None or isinstance(found, str):
        return
    if isinstance(found, int | float):
        yield ".".join(path), {"value": float(found), "low": None, "high": None}
    elif isinstance(found, Mapping) and isinstance(found.get("value"), int | float):
        yield ".".join(path), {name: found.get(name) for name in ("value", "low", "high")}
    elif isinstance(found, Mapping):
        for name, inner in found.items():
            yield from _numbers(inner, (*path, str(name)))
    elif isinstance(found, Sequence):
        for place, inner in enumerate(found):
            yield from _numbers(inner, (*path, _label(inner, place)))


def _label(entry: Any, place: int) -> str:
    """What an entry of a list is called: by its words, or by its place."""
    words = [str(value) for value in entry.values() if isinstance(value, str)] if isinstance(entry, Mapping) else []
    return "/".join(word or "every category" for word in words) or str(place)


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A header and one line per row; an unknown limit is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")


def write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Two columns of texts, three of numbers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = pa.schema([(name, pa.string() if name in COLUMNS[:2] else pa.float64()) for name in COLUMNS])
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=kinds), temporary)


def write_latex(rows: Sequence[Mapping[str, Any]], path: Path, *, measures: Sequence[str] = ()) -> None:
    """A booktabs table with a row per system and a column per measure, by default the harm of every category.

    Args: measures: As in the rows.
    Raises: UserError for a measure that no system has.
    """
    known = list(dict.fromkeys(row["measure"] for row in rows))
    wanted = list(measures) or [name for name in known if name.startswith("ip.every category/") and name.endswith(".rate.share")]
    for name in wanted:
        if name not in known:
            raise UserError(
                f"--measure must be one of the summary's, got {name}.{close_to(name, known)} Known: {', '.join(known[:30])}."
            )
    cells = {(row["system"], row["measure"]): row for row in rows}
    heads = [_escaped(name.removeprefix("ip.every category/").removesuffix(".rate.share")) for name in wanted]
    lines = [rf"\begin{{tabular}}{{l{'r' * len(wanted)}}}", r"\toprule", " & ".join(["system", *heads]) + r" \\", r"\midrule"]
    for system in dict.fromkeys(row["system"] for row in rows):
        lines.append(" & ".join([_escaped(system), *(_cell(cells.get((system, name))) for name in wanted)]) + r" \\")
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""]), encoding="utf-8")


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "--"
    limits = "" if row["low"] is None or row["high"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
    return f"{row['value']:.3f}{limits}"


def _escaped(text: str) -> str:
    return "".join(ESCAPES.get(letter, letter) for letter in text)
