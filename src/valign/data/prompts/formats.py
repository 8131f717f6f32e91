"""Layouts of prompt files: a row of any becomes one or two `LabelledPrompt`. A new layout is one function, one row in `FORMATS`."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valign.checks import SEEDS, UserError, check_choice
from valign.data.prompts.pairs import LabelledPrompt
from valign.data.prompts.tables import is_blank, name_cell, read_table, text_cell, whole_cell
from valign.policy import CATEGORY_IDS, normalize_category

COPRO_IMAGE = re.compile(r"(?P<side>[us])_(?P<pair>idx_\d{7}_\d+)\.\w+")  # u_idx_0000012_0.jpg is the pair of s_idx_0000012_0.jpg
LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "safe": 0, "unsafe": 1}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns of a plain table: ``prompt`` and ``label`` (a pair shares a ``pair_id``), or ``unsafe`` and ``safe``."""

    id: str = "id"
    prompt: str = "prompt"
    label: str = "label"
    category: str = "category"
    pair_id: str = "pair_id"
    kind: str = "kind"
    concept: str = "concept"
    seed: str = "seed"
    held_out: str = "held_out"
    unsafe: str = "unsafe"
    safe: str = "safe"


@dataclass(frozen=True, kw_only=True)
class Raw:
    """One prompt as its file gives it, before any check."""

    prompt: str
    label: object
    category: object = ""
    id: str = ""
    pair_id: str = ""
    kind: str = ""
    concept: str = ""
    seed: object = None
    held_out: bool = False


def _plain(row: Mapping[str, Any], columns: Columns) -> Iterator[Raw]:
    shared: dict[str, Any] = {name: text_cell(name, row.get(getattr(columns, name))) for name in ("kind", "concept")}
    listed = row.get(columns.category)
    shared["category"] = row.get("categories") if is_blank(listed) else listed
    shared["held_out"] = name_cell(columns.held_out, row.get(columns.held_out)).casefold() in ("1", "true")
    own, pair = (name_cell(name, row.get(name)) for name in (columns.id, columns.pair_id))
    seed = row.get(columns.seed)
    if columns.unsafe in row and columns.safe in row:
        for side, label in ((columns.unsafe, 1), (columns.safe, 0)):
            text, name = text_cell(side, row[side]), f"{own}-{'su'[label]}"
            yield Raw(prompt=text, label=label, id=name, pair_id=pair or own, seed=seed, **shared)
    else:
        if columns.prompt not in row:
            raise UserError(f"must have a column {columns.prompt!r}, got {', '.join(row)}. Name yours: prompt=NAME.")
        text = text_cell(columns.prompt, row[columns.prompt])
        yield Raw(prompt=text, label=row.get(columns.label), id=own, pair_id=pair, seed=seed, **shared)


def _coprov2(row: Mapping[str, Any], columns: Columns) -> Iterator[Raw]:
    """The release (prompt, image, category; the image's name links the pairs), or rows with pair_id and label."""
    if "image" not in row:
        yield from _plain(row, columns)
        return
    name, prompt = Path(text_cell("image", row["image"])), text_cell("prompt", row["prompt"])
    image = COPRO_IMAGE.fullmatch(name.name)
    pair, label = (image["pair"], int(image["side"] == "u")) if image else ("", 1)  # the test file has unsafe prompts only
    yield Raw(prompt=prompt, label=label, category=row["category"], id=name.stem, pair_id=pair)


def _i2p(row: Mapping[str, Any], columns: Columns) -> Iterator[Raw]:
    """I2P (Schramowski et al., arXiv 2211.05105): real user prompts, one to three categories, often with the seed to use."""
    number = name_cell("case_number", row.get("case_number"))
    own = f"i2p-{number}" if number else name_cell(columns.id, row[columns.id])
    category, seed = row.get("categories", row.get("category")), row.get("evaluation_seed", row.get("sd_seed"))
    yield Raw(prompt=text_cell("prompt", row["prompt"]), label=1, category=category, id=own, seed=seed)


FORMATS: dict[str, Callable[[Mapping[str, Any], Columns], Iterator[Raw]]] = {"plain": _plain, "coprov2": _coprov2, "i2p": _i2p}


def detect_format(row: Mapping[str, Any]) -> str:
    """Name in `FORMATS`, from the columns of a file's first row."""
    if "inappropriate_percentage" in row:
        return "i2p"
    if {"prompt", "image", "category"} <= row.keys() and "label" not in row:
        return "coprov2"
    return "plain"


def read_records(
    path: Path,
    fmt: str | None = None,
    *,
    columns: Columns | None = None,
    fill: Mapping[str, object] | None = None,
    known: Collection[str] = CATEGORY_IDS,
) -> Iterator[tuple[int, LabelledPrompt]]:
    """Row number (from 1) and checked record of every prompt in the file.

    Args:
        fmt: A name in `FORMATS`; None looks at the columns.
        columns: Names of the columns, for the plain layout.
        fill: Values for columns that the file lacks or leaves blank, e.g. ``{"label": 1, "category": "hate"}``.
        known: Category ids that an unsafe prompt may have. A safe prompt keeps a category only if it is known.
    Raises: UserError with the row, for an unknown category, a label that is not 0 or 1, or a missing column.
    """
    table, columns = read_table(path), columns or Columns()
    layout = fmt or detect_format(table[0])
    check_choice("format", layout, FORMATS)
    for number, row in enumerate(table, start=1):
        absent = {columns.id: f"{path.name.split('.')[0]}-{number:05d}", **(fill or {})}
        given = {name: value for name, value in row.items() if not is_blank(value) or name not in absent}
        try:
            for raw in FORMATS[layout](absent | given, columns):
                yield number, _check(raw, known)
        except KeyError as error:
            raise UserError(f"{path}, row {number}: must have column {error} in layout {layout}. Choose another format.") from error
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from error


def _check(raw: Raw, known: Collection[str]) -> LabelledPrompt:
    label = LABELS.get(str(raw.label).strip().casefold())
    if label is None:
        raise UserError(f"label must be 0 (safe) or 1 (unsafe), got {raw.label!r}. Name its column label=NAME, or fill label=1.")
    several = raw.category if isinstance(raw.category, list) else re.split(r"[,;]", text_cell("category", raw.category))
    listed = [text_cell("category", name) for name in several]
    names = {normalize_category(name, known if label and name.strip() else None) for name in listed}
    seed = None if is_blank(raw.seed) else whole_cell("seed", raw.seed, *SEEDS)
    return LabelledPrompt(
        raw.id,
        raw.prompt.strip(),
        label,
        tuple(sorted(names & set(known))),
        pair=raw.pair_id,
        kind=raw.kind,
        concept=raw.concept,
        seed=seed,
        held_out=raw.held_out,
    )
