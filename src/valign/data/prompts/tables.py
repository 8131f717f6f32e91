"""Rows of a csv, tsv, json-lines or parquet file, whatever its columns are."""

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from valign.checks import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


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
        if absent:
            raise UserError(f"{where} must have the column {absent[0]}, got {', '.join(record)}. Name the columns of your file.")
        yield where, record


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
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter="\t" if suffix == ".tsv" else ",", strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path}:{reader.line_num} must have {len(reader.fieldnames or ())} columns. Quote texts that hold a comma."
                )
            yield row
    except csv.Error as error:
        raise UserError(
            f"{path}, after line {reader.line_num}, is not readable as {suffix[1:]}: {error}. Mend what follows."
        ) from error
