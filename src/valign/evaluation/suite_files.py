"""Files of suites: valign's own JSON lines, and any table of prompts."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from valign.checks import SEEDS, UserError
from valign.data.prompts.layouts import LAYOUTS
from valign.data.prompts.pairs import LabelledPrompt, file_names
from valign.data.prompts.readers import scan_prompts
from valign.data.prompts.records import choose_layout, nameless, say_left_out
from valign.data.prompts.tables import AS_IT_IS, TableReading, is_blank, name_cell, read_table, table_stem, text_cell, whole_cell
from valign.evaluation.suite import BENIGN_KINDS, HARM_KINDS, EvalPrompt, Suite
from valign.files import write_text
from valign.policy import CATEGORY_IDS

TEXTS = ("prompt", "category", "kind", "concept", "counterpart")  # fields that are texts


def read_suite(
    path: str | Path, layout: str | None = None, *, reading: TableReading = AS_IT_IS, known: Collection[str] = CATEGORY_IDS
) -> Suite:
    """Read a suite: a table of prompts with labels, in any layout that is read; or one of a prompt's own fields in each row, after
    an optional first row ``{"suite": name, "stand_in": bool}``, as `write_suite` writes it.

    A labelled prompt of several categories stands for the first by name; its kind is explicit where the table has none.
    Args:
        layout, reading, known: As `valign.data.prompts.records.prompt_records` takes them.
    Raises: UserError that names file and row: not a table, unknown or missing fields, repeated ids, an unsafe prompt that has no
        category.
    """
    path = Path(path)
    rows = read_table(path, replace(reading, fill={}))
    header = rows.pop(0) if "suite" in rows[0] and "prompt" not in rows[0] else {}
    name, stand_in = str(header.get("suite", table_stem(path))), bool(header.get("stand_in", False))
    columns = {column for row in rows for column in row}
    labelled = bool(rows) and (choose_layout(rows, layout, path) != "plain" or bool({"label", "safe"} & {*columns, *reading.fill}))
    if labelled:
        return Suite(name, tuple(_labelled(path, layout, reading, known)), stand_in)
    return Suite(name, tuple(_own(path, number, reading.filled(row)) for number, row in enumerate(rows, start=1)), stand_in)


def _labelled(path: Path, layout: str | None, reading: TableReading, known: Collection[str]) -> list[EvalPrompt]:
    found = scan_prompts(path, layout, reading=reading, known=known)
    unnamed = [row.id for row in found.rows if row.label and not row.categories]
    if unnamed and len(unnamed) == sum(row.label for row in found.rows):
        raise UserError(
            f"{path} must name a category of the policy for its unsafe prompts, got none, first {unnamed[0]}. "
            f"Fill category=NAME; known: {', '.join(known)}."
        )
    say_left_out(f"prompts of {path.name}", {**found.dropped, "no category of the policy": len(unnamed)})
    rows = [row for row in found.rows if row.categories or not row.label]
    names = file_names(row.id for row in rows)
    return [_eval_prompt(names[row.id], row) for row in rows]


def _eval_prompt(name: str, row: LabelledPrompt) -> EvalPrompt:
    kinds = HARM_KINDS if row.label else BENIGN_KINDS
    kind = row.kind if row.kind in kinds else kinds[0]
    category = row.categories[0] if row.label else ""
    return EvalPrompt(name, row.prompt, category, kind, row.concept, row.held_out, seed=row.seed)


def _own(path: Path, number: int, row: Mapping[str, Any]) -> EvalPrompt:
    """A row whose columns are the fields of a prompt."""
    fields = EvalPrompt.__dataclass_fields__
    unknown = sorted(set(row) - set(fields))
    if unknown or "prompt" not in row:
        raise UserError(
            f"{path}:{number} must have a prompt and no other fields than {', '.join(fields)}; got {', '.join(row)}. "
            f"Name your columns by --column, or give each row a label: 0 (safe) or 1 (unsafe). Known layouts: {', '.join(LAYOUTS)}."
        )
    given = {name: value for name, value in row.items() if not is_blank(value)}
    try:
        texts = {name: text_cell(name, given[name]) for name in TEXTS if name in given}
        known: dict[str, Any] = {
            **given,
            **texts,
            "id": name_cell("id", given.get("id")) or nameless(path, number),
            "prompt": texts.get("prompt", ""),
            "held_out": name_cell("held_out", row.get("held_out")).casefold() in ("1", "true"),
            "seed": whole_cell("seed", given["seed"], *SEEDS) if "seed" in given else None,
        }
        return EvalPrompt(**known)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}:{number}: {error}") from error


def write_suite(path: str | Path, suite: Suite) -> None:
    """Write a suite as `read_suite` reads it; fields that are at their default are left out."""
    default = EvalPrompt("id", "prompt")
    lines = [{"suite": suite.name, "stand_in": suite.stand_in}]
    for prompt in suite.prompts:
        kept = {key: value for key, value in asdict(prompt).items() if key in ("id", "prompt") or value != getattr(default, key)}
        lines.append(kept)
    write_text(Path(path), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
