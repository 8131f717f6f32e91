"""Rows of a table (csv, tsv, JSON, JSON lines, parquet, plain lines), whatever its columns are, and what a cell may hold."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path

from valign.checks import UserError, close_to
from valign.data.prompts.table_files import INDEX, READERS, UNPACK, UNPACK_ERRORS, Row

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")  # of tables with columns
WHOLE = re.compile(r"\s*[+-]?[0-9]+(\.0*)?\s*")
EXACT = 2**53  # floats hold every whole number up to here


@dataclass(frozen=True, kw_only=True)
class TableReading:
    """How the columns of a file become fields: ``--column NAME=THEIRS`` and ``--fill NAME=VALUE`` of every command.

    Args:
        columns: The file's own name of a field, by the field's name.
        fill: Values of fields that the file lacks or leaves blank.
        strict: A named column that the file lacks is refused; else the field is looked for under its own name.
        of_others: The same as ``columns`` for the other tables of the command, by the option that names one: ``--column
            suite.prompt=text``.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    fill: Mapping[str, object] = field(default_factory=dict)
    strict: bool = True
    of_others: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def beside(self, option: str = "") -> "TableReading":
        """For a second table of the same command: columns where it has them, and nothing filled in.

        Args: option: That names the table, without its dashes; its own columns come first.
        """
        own = self.of_others.get(option, {})
        return TableReading(columns={**self.columns, **own}, strict=False, of_others=self.of_others)

    def without(self, names: Collection[str]) -> "TableReading":
        """Without columns that only a second table of the command has."""
        return replace(self, columns={name: theirs for name, theirs in self.columns.items() if name not in names})

    def named(self, rows: Sequence[Row], path: Path) -> list[Row]:
        """The rows with the file's columns renamed and blanks filled in. Raises: UserError if a named column is not there."""
        have = dict.fromkeys(name for row in rows for name in row)
        absent = [theirs for theirs in self.columns.values() if theirs not in have]
        if absent and self.strict:
            raise UserError(
                f"{path} must have the column {absent[0]}, got {', '.join(have)}.{close_to(absent[0], have)} Mend --column."
            )
        renamed = {name: theirs for name, theirs in self.columns.items() if theirs in have}
        return [self.filled(row | {name: row.get(theirs) for name, theirs in renamed.items()}) for row in rows]

    def filled(self, row: Row) -> Row:
        """The row with `fill` where it is blank."""
        return row | {name: value for name, value in self.fill.items() if is_blank(row.get(name))}


AS_IT_IS = TableReading()


def read_table(path: Path, reading: TableReading = AS_IT_IS) -> list[Row]:
    """Every row as a dict by column name, in file order; an index without a name is left out. Text files may be packed (`UNPACK`).

    Raises: UserError if the file is missing, of another kind, broken (with the line), or has no rows, or by ``reading``.
    """
    if not path.is_file():
        raise UserError(
            f"{path} must be a file of prompts, got {'a folder' if path.is_dir() else 'nothing there'}. Check the path."
        )
    suffix = table_suffix(path)
    if suffix not in READERS or (suffix == ".parquet" and path.suffix in UNPACK):
        listed = f"{', '.join(READERS)} (text also with {' or '.join(UNPACK)})"
        raise UserError(f"{path} must end in {listed}, got {suffix!r}. Convert it first.")
    try:
        rows = [{name: row[name] for name in row if not INDEX.fullmatch(name)} for row in READERS[suffix](path)]
    except (UnicodeDecodeError, *UNPACK_ERRORS) as error:
        raise UserError(f"{path} is not UTF-8 text: {error}. Save it again as UTF-8.") from error
    if not rows:
        raise UserError(f"{path} must hold at least one row, got 0. Check that it was written to the end.")
    return reading.named(rows, path)


def table_suffix(path: Path) -> str:
    """The ending that tells the kind of table, that of packing aside."""
    return _unpacked(path).suffix


def table_stem(path: Path) -> str:
    """The file's name without its endings."""
    return _unpacked(path).stem


def _unpacked(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in UNPACK else path


def is_table(path: Path) -> bool:
    """Whether a file in a folder of tables is one of them, by its ending: not plain text, nor a ``run.json`` of ours."""
    return table_suffix(path) in SUFFIXES and path.name != "run.json" and path.is_file()


def read_records(path: Path, columns: Sequence[str], reading: TableReading = AS_IT_IS) -> Iterator[tuple[str, Row]]:
    """Each row of `read_table` with its place in words. Raises: UserError, with the place, where one of ``columns`` is missing."""
    for number, record in enumerate(read_table(path, reading), start=1):
        where = f"{path}, row {number}"
        absent = [column for column in columns if record.get(column) is None]
        if absent and absent[0] in record:
            raise UserError(f"{where} must have a value in {absent[0]}, got an empty cell. Mend or delete the row.")
        if absent:
            raise UserError(
                f"{where} must have the column {absent[0]}, got {', '.join(record)}.{close_to(absent[0], record)} "
                f"Name yours: --column {absent[0]}=NAME."
            )
        yield where, record


def is_blank(value: object) -> bool:
    """Whether a cell is empty: nothing, no letters, or NaN, which stands for nothing in tables of numbers."""
    return value is None or value == "" or value != value


def text_cell(column: str, value: object) -> str:
    """A cell that must be text; ``""`` if it is empty. Raises: UserError for a list, a number or half a character."""
    if is_blank(value):
        return ""
    if not isinstance(value, str):
        raise UserError(f"{column} must be text, got {kind_of(value)}. Mend or delete the row.")
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


def kind_of(value: object) -> str:
    """What a cell holds, in words."""
    names = {
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        bytes: "bytes",
    }
    return names.get(type(value), type(value).__name__)


def _shown(value: object) -> str:
    return f"{value!r}" if isinstance(value, str | int | float) else kind_of(value)


def find_table(folder: Path, stems: Sequence[str]) -> Path:
    """The first file in ``folder`` with one of these names and an ending of `SUFFIXES`. Raises: UserError if there is none."""
    for stem in stems:
        if found := tables_named(folder, stem):
            return found[0]
    wanted = " or ".join(f"{stem}.jsonl" for stem in stems)
    raise UserError(f"{folder} must hold {wanted} (or csv, tsv, json, parquet), got none of them. Name the files themselves.")


def tables_named(folder: Path, stem: str) -> list[Path]:
    """Files ``stem.csv`` and the like in ``folder``."""
    packed = [f"{suffix}{packing}" for suffix in SUFFIXES if suffix != ".parquet" for packing in UNPACK]
    endings = [*SUFFIXES, *packed]
    return [folder / f"{stem}{ending}" for ending in endings if (folder / f"{stem}{ending}").is_file()]
