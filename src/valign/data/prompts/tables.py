"""Rows of a csv, tsv, json-lines or parquet file, whatever its columns are, and what a cell of them may hold."""

import csv
import gzip
import io
import json
import re
from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from valign.checks import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
DELIMITERS = ",;\t|"
WHOLE = re.compile(r"\s*[+-]?[0-9]+(\.0*)?\s*")
EXACT = 2**53  # floats hold every whole number up to here


def read_table(path: Path) -> list[dict[str, Any]]:
    """Every row as a dict by column name, in file order. ``.gz`` is unpacked for text files.

    Raises: UserError if the file is missing, of another kind, broken (with the line), or has no rows.
    """
    if not path.is_file():
        raise UserError(
            f"{path} must be a file of prompts, got {'a folder' if path.is_dir() else 'nothing there'}. Check the path."
        )
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in SUFFIXES:
        raise UserError(f"{path} must end in {', '.join(SUFFIXES)} (text also with .gz), got {suffix!r}. Convert it first.")
    try:
        rows = list(_parquet(path) if suffix == ".parquet" else _json_lines(path) if suffix == ".jsonl" else _csv(path, suffix))
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path} is not UTF-8 text: {error}. Save it again as UTF-8.") from error
    if not rows:
        raise UserError(f"{path} must hold at least one row, got 0. Check that it was written to the end.")
    return rows


def read_records(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of `read_table` with its place in words. Raises: UserError, with the place, where one of ``columns`` is missing."""
    for number, record in enumerate(read_table(path), start=1):
        where = f"{path}, row {number}"
        absent = [column for column in columns if record.get(column) is None]
        if absent and absent[0] in record:
            raise UserError(f"{where} must have a value in {absent[0]}, got an empty cell. Mend or delete the row.")
        if absent:
            raise UserError(f"{where} must have the column {absent[0]}, got {', '.join(record)}. Name the columns of your file.")
        yield where, record


def is_blank(value: object) -> bool:
    """Whether a cell is empty: nothing, no letters, or NaN, which stands for nothing in tables of numbers."""
    return value is None or value == "" or value != value


def text_cell(column: str, value: object) -> str:
    """A cell that must be text; ``""`` if it is empty. Raises: UserError for a list, a number or half a character."""
    if is_blank(value):
        return ""
    if not isinstance(value, str):
        raise UserError(f"{column} must be text, got {_kind(value)}. Mend or delete the row.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{column} must be whole characters, got half of one at {error.start} (\\u{ord(value[error.start]):04x}). Mend the row."
        ) from None
    return value


def name_cell(column: str, value: object) -> str:
    """A cell that names something, an id or a class: text, or a whole number. Raises: UserError for anything else."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return text_cell(column, value)


def number_cell(column: str, value: object) -> float:
    """A cell that must be a finite number, as such or in digits. Raises: UserError if it is not."""
    try:
        number = float("nan") if isinstance(value, bool) or "_" in str(value) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not isfinite(number):
        raise UserError(f"{column} must be a number, got {_shown(value)}. Mend or delete the row.")
    return number


def whole_cell(column: str, value: object, low: int, high: int) -> int:
    """A cell that must be a whole number in ``[low, high]``, digit by digit. Raises: UserError if it is not."""
    number: int | None = None
    if isinstance(value, str) and WHOLE.fullmatch(value):
        number = int(value.split(".")[0])
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, float) and value.is_integer() and abs(value) <= EXACT:
        number = int(value)
    if number is None or not low <= number <= high:
        raise UserError(f"{column} must be a whole number in [{low}, {high}], got {_shown(value)}. Mend it, or leave it blank.")
    return number


def _kind(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), type(value).__name__)


def _shown(value: object) -> str:
    return f"{value!r}" if isinstance(value, str | int | float) else _kind(value)


def find_table(folder: Path, stems: Sequence[str]) -> Path:
    """The first file in ``folder`` with one of these names and an ending of `SUFFIXES`. Raises: UserError if there is none."""
    for stem in stems:
        if found := tables_named(folder, stem):
            return found[0]
    wanted = " or ".join(f"{stem}.jsonl" for stem in stems)
    raise UserError(f"{folder} must hold {wanted} (or csv, tsv, parquet), got none of them. Name the files themselves.")


def tables_named(folder: Path, stem: str) -> list[Path]:
    """Files ``stem.csv`` and the like in ``folder``."""
    endings = [*SUFFIXES, *(f"{suffix}.gz" for suffix in SUFFIXES if suffix != ".parquet")]
    return [folder / f"{stem}{ending}" for ending in endings if (folder / f"{stem}{ending}").is_file()]


def _text(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8-sig")


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from pq.read_table(path).to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a parquet file: {str(error).splitlines()[0]}. Write it again.") from error


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):  # not splitlines: prompts hold U+2028 and its like
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} is not JSON: {error}. Mend or delete that line.") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number} must be a JSON object, got {type(row).__name__}. Write one object a line.")
        yield row


def _csv(path: Path, suffix: str) -> Iterator[dict[str, Any]]:
    text = _text(path)
    first, _, rest = text.partition("\n")
    if hint := re.fullmatch(r'"?sep=(.)"?\r?', first, re.IGNORECASE):  # Excel's own word for the delimiter
        text, delimiter = rest, hint[1]
    else:
        delimiter = _delimiter(first, "\t" if suffix == ".tsv" else ",")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                named = {"\t": "tab", ",": "comma", ";": "semicolon"}.get(delimiter, repr(delimiter))
                raise UserError(
                    f"{path}:{reader.line_num} must have {len(reader.fieldnames or ())} columns, separated by {named}. "
                    f"Quote texts that hold a {named}."
                )
            yield row
    except csv.Error as error:
        raise UserError(
            f"{path}, after line {reader.line_num}, is not readable as {suffix[1:]}: {error}. Mend what follows."
        ) from error


def _delimiter(header: str, usual: str) -> str:
    """What separates the columns: ``usual``, unless the header is one column by it and several by another of `DELIMITERS`."""
    counts = {sign: len(next(csv.reader([header], delimiter=sign), [])) for sign in DELIMITERS}
    return usual if counts[usual] > 1 else max(DELIMITERS, key=lambda sign: (counts[sign], sign == usual))
