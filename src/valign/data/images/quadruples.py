"""Quadruples of one subject: a safe caption and image, an unsafe caption and image; what safety-aware CLIPs learn from."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from valign.checks import UserError
from valign.data.images.rows import load_image_rows
from valign.data.prompts.pairs import load_pairs
from valign.data.prompts.tables import AS_IT_IS, TableReading, is_blank, read_table, tables_named, text_cell
from valign.files import hash_value
from valign.images import open_image
from valign.policy import normalize_category

STEM = "quadruples"
COLUMNS = "safe, unsafe, category, and safe_image and unsafe_image (paths beside the table; both or neither)"


@dataclass(frozen=True)
class Quadruple:
    """Two captions and, if there are images, one of each. ``category`` is the harm that the unsafe side shows."""

    id: str
    safe: str
    unsafe: str
    category: str
    safe_image: Path | Image.Image | None = None
    unsafe_image: Path | Image.Image | None = None

    def image(self, side: str) -> Image.Image:
        """The ``"safe"`` or the ``"unsafe"`` image as RGB."""
        source = self.safe_image if side == "safe" else self.unsafe_image
        assert source is not None
        return open_image(source) if isinstance(source, Path) else source


@dataclass(frozen=True)
class Quadruples:
    """Rows with images throughout, or without any. Raises: UserError for a mixture, or fewer than 2 rows."""

    rows: tuple[Quadruple, ...]
    origin: str  # in messages and records

    def __post_init__(self) -> None:
        if len(self.rows) < 2:
            raise UserError(f"{self.origin} must hold at least 2 quadruples, got {len(self.rows)}: a contrast needs others.")
        for row in self.rows:
            if (row.safe_image is None) != (row.unsafe_image is None):
                raise UserError(f"{self.origin}, {row.id}: a quadruple must have both images or none, got one. Mend or delete it.")
        if len({row.safe_image is None for row in self.rows}) > 1:
            raise UserError(f"{self.origin} must have images in every row or in none, got both. Split the table.")

    @property
    def has_images(self) -> bool:
        return self.rows[0].safe_image is not None

    @property
    def categories(self) -> tuple[str, ...]:
        """Of the unsafe sides, sorted."""
        return tuple(sorted({row.category for row in self.rows}))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over captions, categories and pixels, hex."""
        found = []
        for row in self.rows:
            pixels = [hash_value(row.image(side).tobytes().hex()) for side in ("safe", "unsafe")] if self.has_images else []
            found.append([row.safe, row.unsafe, row.category, *pixels])
        return hash_value(found)

    def split(self, share: float, *, seed: int) -> tuple["Quadruples", "Quadruples"]:
        """Two parts, the second of about this share; rows of one safe caption stay together. Raises: UserError for too few rows."""
        names = sorted({row.safe for row in self.rows})
        order = np.random.default_rng([seed, 41]).permutation(len(names))
        held = {names[int(place)] for place in order[: max(1, round(share * len(names)))]}
        parts = [tuple(row for row in self.rows if (row.safe in held) == side) for side in (False, True)]
        first, second = (Quadruples(part, f"a part of {self.origin}") for part in parts)
        return first, second


def read_quadruples(folder: Path, *, known: Collection[str], reading: TableReading = AS_IT_IS) -> Quadruples:
    """Quadruples of a data set of ``valign data build``, or of a folder with a table ``quadruples`` (csv, jsonl, parquet).

    Args:
        known: Ids of the policy's categories.
        reading: Other names of the table's columns.
    Raises: UserError without either, and with the row for a caption, a category or an image that is not usable.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} must be a folder with quadruples, it does not exist. Check the path.")
    if (folder / "prompts" / "pairs.parquet").is_file():
        return _of_pairs(folder, known)
    tables = tables_named(folder, STEM)
    if len(tables) != 1:
        raise UserError(
            f"{folder} must be a data set of `valign data build`, or hold one table {STEM}.csv, .jsonl or .parquet with {COLUMNS}; "
            f"got {', '.join(path.name for path in tables) or 'none'}."
        )
    rows = []
    for number, row in enumerate(read_table(tables[0], reading), start=1):
        try:
            rows.append(_of_row(folder, row, number, known))
        except ValueError as error:  # UserError is one
            raise UserError(f"{tables[0]}, row {number}: {error}") from error
    return _checked(Quadruples(tuple(rows), str(folder)))


def _of_row(folder: Path, row: Mapping[str, Any], number: int, known: Collection[str]) -> Quadruple:
    for column in ("safe", "unsafe", "category"):
        if is_blank(row.get(column)):
            raise UserError(
                f"{column} must be given, got {'an empty cell' if column in row else ', '.join(row)}. Name yours by --column."
            )
    images = [_file(folder, column, row.get(column)) for column in ("safe_image", "unsafe_image")]
    category = normalize_category(text_cell("category", row["category"]), known)
    return Quadruple(f"row-{number}", text_cell("safe", row["safe"]), text_cell("unsafe", row["unsafe"]), category, *images)


def _file(folder: Path, column: str, value: Any) -> Path | None:
    if is_blank(value):
        return None
    path = folder / text_cell(column, value)
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise UserError(f"{column} must be a file in {folder}, got {value!r}. Mend the path.")
    return path


def _of_pairs(folder: Path, known: Collection[str]) -> Quadruples:
    """Kept image pairs with their prompts; held-out ones and those of a category that the policy lacks are left out."""
    kept = {row.id for row in load_image_rows(folder / "images") if row.kept}
    rows = [
        Quadruple(pair.id, pair.safe, pair.unsafe, pair.categories[0], *_pair_files(folder / "images", pair.id))
        for pair in load_pairs(folder / "prompts" / "pairs.parquet")
        if pair.id in kept and not pair.held_out and pair.categories and pair.categories[0] in known
    ]
    return _checked(Quadruples(tuple(rows), str(folder)))


def _pair_files(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}_{side}.png" for side in ("safe", "unsafe")]


def _checked(found: Quadruples) -> Quadruples:
    """With every image opened once. Raises: UserError for one that cannot be read."""
    for row in found.rows if found.has_images else ():
        for side in ("safe", "unsafe"):
            row.image(side)
    return found


def unsafe_rows(rows: Sequence[Quadruple]) -> list[tuple[str, str]]:
    """Unsafe captions with their categories."""
    return [(row.unsafe, row.category) for row in rows]
