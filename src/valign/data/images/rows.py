"""The table of image pairs: what became of each pair's two images."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from valign.checks import UserError
from valign.data.prompts.pairs import PromptPair
from valign.files import atomic_path

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("seed", pa.uint32()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),
        ("harm_unsafe", pa.float64()),
        ("harm_safe", pa.float64()),
        ("sha256", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class ImageRow:
    """What became of one pair's images ``{id}_unsafe.png`` and ``{id}_safe.png``."""

    id: str
    seed: int  # of the unsafe image's initial latent; 0 for imported images
    kept: bool
    reason: str = ""  # why not kept: "unreadable", "harmless" (unsafe image shows no harm), "harmful" (safe image does), "equal"
    harm_unsafe: float | None = None  # detector score in [0, 1], see `harm_scores`; None without a detector
    harm_safe: float | None = None
    sha256: str = ""  # of both files' hashes: the identity of the images


def write_image_rows(folder: Path, rows: Sequence[ImageRow]) -> None:
    """Write ``images.parquet`` atomically, in the order given."""
    with atomic_path(folder / "images.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA), temporary)


def load_image_rows(folder: Path) -> list[ImageRow]:
    """Read ``images.parquet``. Raises: UserError if it is not there."""
    path = folder / "images.parquet"
    if not path.exists():
        raise UserError(f"{path} does not exist. Make the images with `valign data build`.")
    return [ImageRow(**row) for row in pq.read_table(path, schema=SCHEMA).to_pylist()]


def count_kept(pairs: Sequence[PromptPair], rows: Sequence[ImageRow]) -> dict[str, dict[str, int]]:
    """Per category id, sorted: ``pairs``, ``kept``, and how many were dropped for each reason."""
    counts: dict[str, Counter[str]] = {}
    for pair, row in zip(pairs, rows, strict=True):
        for category in pair.categories:
            counts.setdefault(category, Counter(pairs=0, kept=0)).update(["pairs", row.reason or "kept"])
    return {category: dict(found) for category, found in sorted(counts.items())}
