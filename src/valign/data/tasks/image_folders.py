"""Images with captions as trainers keep them: a table beside the images, a table that holds them, or a caption file for each.

- ``metadata`` or ``train`` with an ending of a table (the Hub's image folders); columns ``file_name`` and ``text``;
- parquet with the images' bytes in it (column ``image``), one file or several;
- ``a.png`` beside ``a.txt`` or ``a.caption``, also in sub-folders called ``REPEATS_WORDS``, which train their images so many times
  and give ``WORDS`` to images without a caption (kohya's sd-scripts).
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from valign.checks import UserError
from valign.data.prompts.tables import AS_IT_IS, Row, TableReading, find_table, name_cell, read_table, tables_named, text_cell
from valign.files import hash_file
from valign.images import count_frames, image_files, open_image
from valign.progress import console

TABLES = ("metadata", "train")  # names of the table in a folder of images
CAPTIONS = (".txt", ".caption")
REPEATED = re.compile(r"(\d+)_(.+)")  # kohya's folders
FEW = 20  # images, below which they are rather learnt by heart
COLUMNS = {"file_name": ("image", "file", "image_path"), "text": ("caption", "prompt")}  # a column's other usual names


@dataclass(frozen=True)
class Listed:
    """An image of a folder: a file, or the bytes of a table's cell."""

    caption: str
    source: Path | bytes
    where: str  # in words
    repeats: int = 1
    extent: tuple[int, int] = (0, 0)  # width and height as shown, pixels

    def digest(self) -> str:
        """SHA-256 of the image's bytes, hex."""
        return hashlib.sha256(self.source).hexdigest() if isinstance(self.source, bytes) else hash_file(self.source)


def list_images(
    place: Path, image: str, caption: str, *, reading: TableReading = AS_IT_IS, skip_unreadable: bool = False
) -> list[Listed]:
    """Every image with its caption, checked: it can be opened, and has a caption that is not empty.

    Args:
        place: A folder, or a table.
        image, caption: Columns of the table.
        skip_unreadable: Leaves out images that cannot be opened, and says which, instead of refusing them all.
    Raises: UserError that names rows or files, for a missing column or an empty caption, an image that is missing or broken, an
        image without a caption, or a caption without an image.
    """
    if place.is_file() or not place.is_dir() or any(tables_named(place, name) for name in TABLES):
        found = list(_of_table(find_table(place, TABLES) if place.is_dir() else place, image, caption, reading))
    elif shards := sorted(place.glob("*.parquet")):
        found = [one for shard in shards for one in _of_table(shard, image, caption, reading)]
    else:
        found = _beside(place)
    broken, kept = dict[str, str](), list[Listed]()
    for one in found:
        try:
            kept.append(replace(one, extent=_extent(one)))
        except UserError as error:
            broken[one.where] = str(error)
    if broken and not skip_unreadable:
        where, reason = next(iter(broken.items()))
        more = f" {len(broken)} of {len(found)} images cannot be read; --skip-unreadable leaves them out." if len(found) > 1 else ""
        raise UserError(f"{where} must name an image: {reason} Mend or delete it.{more}")
    for where, reason in broken.items():
        console.print(f"left out: {where}: {reason}", style="yellow", soft_wrap=True, markup=False)
    if not kept:
        raise UserError(f"{place} must hold at least one image that can be read, got {len(found)} that cannot.")
    if len(kept) < FEW:
        few = f"{place}: {len(kept)} images are few, and soon learnt by heart; watch the held-out loss"
        console.print(few, style="yellow", soft_wrap=True, markup=False)
    return kept


def _of_table(table: Path, image: str, caption: str, reading: TableReading) -> Iterator[Listed]:
    rows = read_table(table, reading)
    have = {name for row in rows for name in row}
    image, caption = (_usual(name, have) for name in (image, caption))
    for number, row in enumerate(rows, start=1):
        where = f"{table}, row {number}"
        text = text_cell(f"{where}: {caption}", _cell(row, caption, where))
        if not text.strip():
            raise UserError(f"{where} must have a caption in {caption}, got an empty one. Mend or delete the row.")
        yield Listed(text, _source(_cell(row, image, where), f"{where}: {image}", table.parent), where)


def _usual(name: str, have: set[str]) -> str:
    return next((other for other in (name, *COLUMNS.get(name, ())) if other in have), name)


def _cell(row: Row, column: str, where: str) -> Any:
    if row.get(column) is None:
        got = f"an empty cell in {column}" if column in row else ", ".join(row)
        raise UserError(f"{where} must have the column {column}, got {got}. Name yours: --column {column}=NAME.")
    return row[column]


def _source(value: object, name: str, folder: Path) -> Path | bytes:
    """Of a path, of bytes, or of the Hub's object of both."""
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, bytes) else folder / name_cell(name, value)


def _beside(place: Path) -> list[Listed]:
    """Images with caption files, in ``place`` and its sub-folders."""
    found: list[Listed] = []
    for folder in (place, *sorted(path for path in place.iterdir() if path.is_dir() and path.name[0] != ".")):
        named = REPEATED.fullmatch(folder.name) if folder != place else None
        repeats, words = (int(named[1]), named[2].replace("_", " ")) if named else (1, "")
        images = image_files(folder)
        stems = {path.stem for path in images}
        lonely = [path for path in sorted(folder.iterdir()) if path.suffix in CAPTIONS and path.stem not in stems]
        if lonely:
            raise UserError(
                f"{lonely[0]} must be the caption of an image of its name, got no image for {len(lonely)} such files. "
                "Move them away."
            )
        found += [Listed(_caption(path) or words, path, str(path), max(repeats, 1)) for path in images if repeats]
    bare = [one.where for one in found if not one.caption]
    if bare:
        raise UserError(
            f"{place} must hold a caption for every image, got {len(bare)} of {len(found)} without one, first {bare[0]}. Write it "
            "into a .txt file of the image's name, list all in metadata.jsonl, or name the folder REPEATS_WORDS."
        )
    if not found:
        raise UserError(f"{place} must hold images with captions, or metadata.jsonl (or csv, parquet), got neither. Check --data.")
    return found


def _caption(path: Path) -> str:
    """The first line of the caption file, as kohya's trainers take it; "" without one."""
    file = next((path.with_suffix(ending) for ending in CAPTIONS if path.with_suffix(ending).is_file()), None)
    if file is None:
        return ""
    try:
        lines = file.read_text(encoding="utf-8-sig").strip().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}. Save it again as UTF-8.") from error
    if not lines:
        raise UserError(f"{file} must hold a caption, got an empty file. Write one, or delete the file.")
    return lines[0].strip()


def _extent(one: Listed) -> tuple[int, int]:
    """Width and height. Raises: UserError if the image cannot be opened."""
    name = one.where if isinstance(one.source, bytes) else ""
    if (frames := count_frames(one.source, name=name)) > 1:
        console.print(f"{one.where} is animated: the first of {frames} frames is taken", style="yellow", markup=False)
    return open_image(one.source, name=name).size


def bucket_of(width: int, height: int, *, side: int, step: int) -> tuple[int, int]:
    """The bucket (width, height) of an image: of at most ``side * side`` pixels, in steps of ``step``, the nearest in shape.

    Sides go from half of ``side`` to twice it, as in kohya's trainers, which take the least difference of width to height.
    """
    ratio = width / height
    return min(buckets(side, step), key=lambda one: (abs(one[0] / one[1] - ratio), one))


def buckets(side: int, step: int) -> Sequence[tuple[int, int]]:
    """Every bucket (width, height), the square among them."""
    low, high = max(step, side // 2 // step * step), 2 * side
    found = {(side, side)}
    for first in range(low, high + 1, step):
        second = min(high, side * side // first // step * step)
        if second >= low:
            found |= {(first, second), (second, first)}
    return sorted(found)
