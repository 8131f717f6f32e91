"""The files that a table may be: each a function from a path to rows by column name."""

import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from valign.checks import UserError

DELIMITERS = ",;\t|"
UNPACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".xz": lzma.decompress}
UNPACK_ERRORS = (gzip.BadGzipFile, lzma.LZMAError, EOFError)
INDEX = re.compile(r"|Unnamed: \d+|__index_level_\d+__")  # columns that pandas leaves behind
UNQUOTED = ("Prompt\tCategory\tChallenge\tNote",)  # headers of tab-separated files whose quote signs are part of the text
TEXTS = ("prompt", "text", "caption")  # columns by which a JSON object of columns is told from one of rows
Row = dict[str, Any]


def parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa  # slow to import
    import pyarrow.parquet as pq

    try:
        yield from pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path} is not a parquet file: {str(error).splitlines()[0]}. Write it again.") from error


def line_rows(path: Path) -> Iterator[Row]:
    """Plain text: a prompt a line."""
    yield from ({"prompt": line.strip("\r")} for line in _text(path).split("\n") if line.strip())


def json_line_rows(path: Path) -> Iterator[Row]:
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


def json_rows(path: Path) -> Iterator[Row]:
    """A list of objects or of texts, or an object: of columns, as pandas writes it; of rows by id; or with one list in it."""
    try:
        whole = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise UserError(f"{path} is not JSON: {error}. Mend it; one object a line is a .jsonl file.") from error
    for number, row in enumerate(_json_list(whole), start=1):
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number} must be a JSON object, got {type(row).__name__}. Write a list of objects.")
        yield row


def _json_list(whole: object) -> Sequence[Any]:
    if not isinstance(whole, dict):
        return whole if isinstance(whole, list) else [whole]
    if isinstance(whole.get("annotations"), list) and isinstance(whole.get("images"), list):  # COCO
        images = {image["id"]: image for image in whole["images"]}
        return [{"file_name": images.get(note["image_id"], {}).get("file_name")} | note for note in whole["annotations"]]
    if whole and all(isinstance(value, Mapping) for value in whole.values()):
        return _keyed(whole)
    if whole and all(isinstance(value, list) for value in whole.values()) and len({*map(len, whole.values())}) == 1:
        return [dict(zip(whole, values, strict=True)) for values in zip(*whole.values(), strict=True)]
    lists = [value for value in whole.values() if isinstance(value, list)]
    return lists[0] if len(lists) == 1 else [whole]


def _keyed(whole: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """``{column: {row: value}}``, or ``{row: {column: value}}``, whose row names become ids."""
    inner = {key for value in whole.values() for key in value}
    by_column = not all(key.isdigit() for key in whole) and (
        all(key.isdigit() for key in inner) or any(name.casefold() in TEXTS for name in whole)
    )
    if not by_column:
        return [{"id": name} | dict(row) for name, row in whole.items()]
    names = dict.fromkeys(name for values in whole.values() for name in values)
    return [{column: values[name] for column, values in whole.items() if name in values} for name in names]


def csv_rows(path: Path) -> Iterator[Row]:
    suffix = Path(path.name.removesuffix(path.suffix)).suffix if path.suffix in UNPACK else path.suffix
    text = _text(path)
    first, _, rest = text.partition("\n")
    if hint := re.fullmatch(r'"?sep=(.)"?\r?', first, re.IGNORECASE):  # Excel's own word for the delimiter
        text, delimiter = rest, str(hint[1])
    else:
        delimiter = _delimiter(first, "\t" if suffix == ".tsv" else ",")
    quoting: Literal[0, 3] = csv.QUOTE_NONE if first.strip("\r") in UNQUOTED else csv.QUOTE_MINIMAL
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, quoting=quoting)
    names = reader.fieldnames or ()
    twice = next((name for place, name in enumerate(names) if name in names[:place] and not INDEX.fullmatch(name)), None)
    if twice is not None:
        raise UserError(f"{path} must have distinct columns, got {twice!r} twice. Rename one of them.")
    try:
        for row in reader:
            if None in row or None in row.values():
                named = {"\t": "tab", ",": "comma", ";": "semicolon"}.get(delimiter, repr(delimiter))
                raise UserError(
                    f"{path}:{reader.line_num} must have {len(names)} columns, separated by {named}. "
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


def _text(path: Path) -> str:
    data = UNPACK.get(path.suffix, bytes)(path.read_bytes())
    if data.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of Git LFS, not the file itself. Fetch it with `git lfs pull`.")
    return data.decode("utf-8-sig")


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".jsonl": json_line_rows,
    ".json": json_rows,
    ".parquet": parquet_rows,
    ".txt": line_rows,
}
