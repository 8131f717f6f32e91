"""Images with captions for fine-tuning a diffusion model: a table beside the images, as the Hub's image folders have it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError
from valign.data.prompts.tables import find_table, name_cell, read_records, text_cell
from valign.data.tasks.base import Task, TaskData, assemble
from valign.files import hash_file
from valign.images import count_frames, image_tensor, open_image
from valign.progress import console

TABLES = ("metadata", "train")  # names of the table in a folder of images


@dataclass(frozen=True, kw_only=True)
class CaptionTask(Task):
    """Which columns of the table are read."""

    image: str = "file_name"  # path, from the table's folder
    caption: str = "text"


@dataclass(frozen=True)
class CaptionedImage(ABC):
    """A caption and an image, wherever that comes from. ``digest`` is equal for equal images."""

    caption: str
    digest: str
    target: ClassVar[None] = None
    size: ClassVar[int] = 1

    @property
    def content(self) -> str:
        return f"{self.digest}\0{self.caption}"

    @abstractmethod
    def pixels(self, size: int) -> Float[Tensor, "3 {size} {size}"]:
        """The image in [-1, 1]."""


@dataclass(frozen=True)
class PairRow:
    """A safe and an unsafe image of one caption, and a harmless one whose drawing is to stay as it is."""

    winner: CaptionedImage
    loser: CaptionedImage
    benign: CaptionedImage
    target: ClassVar[None] = None
    size: ClassVar[int] = 1

    @property
    def caption(self) -> str:
        return self.winner.caption

    @property
    def content(self) -> str:
        return "\0".join(row.content for row in (self.winner, self.loser, self.benign))


@dataclass(frozen=True)
class CaptionRow(CaptionedImage):
    """The image is a file, ``digest`` its SHA-256."""

    path: Path

    def pixels(self, size: int) -> Float[Tensor, "3 {size} {size}"]:
        """As `image_tensor` makes it. Raises: UserError if the file has gone since it was listed."""
        try:
            return image_tensor(open_image(self.path), size)
        except UserError as error:
            raise UserError(f"{error} It must stay as it was until training ends. Put it back.") from error


def read_captions(
    task: CaptionTask,
    train: Path,
    held_out: Path | None = None,
    *,
    share: float = 0.1,
    train_rows: int | None = None,
    held_out_rows: int | None = None,
    seed: int = 0,
) -> TaskData:
    """Training and judging rows, as `valign.data.tasks.texts.read_data` makes them of texts.

    Args:
        train, held_out: A table, or a folder with ``metadata`` or ``train`` and one of `SUFFIXES` in it.
    Raises: UserError, with the row, for a missing column, an empty caption, or an image that is missing or broken.
    """
    rows, others = _rows(train, task), _rows(held_out, task) if held_out else []
    return assemble(task, train, rows, others, share=share, train_rows=train_rows, held_out_rows=held_out_rows, seed=seed)


def _rows(place: Path, task: CaptionTask) -> list[CaptionRow]:
    table = find_table(place, TABLES) if place.is_dir() else place
    found = []
    for where, record in read_records(table, (task.image, task.caption)):
        caption = text_cell(f"{where}: {task.caption}", record[task.caption])
        path = table.parent / name_cell(f"{where}: {task.image}", record[task.image])
        if not caption.strip():
            raise UserError(f"{where} must have a caption in {task.caption}, got an empty one. Mend or delete the row.")
        found.append(CaptionRow(caption, _digest(path, where), path))
    return found


def _digest(path: Path, where: str) -> str:
    try:
        if (frames := count_frames(path)) > 1:
            console.print(f"{path} is animated: the first of {frames} frames is taken", style="yellow")
        open_image(path)
        return hash_file(path)
    except UserError as error:
        raise UserError(f"{where} must name an image: {error} Mend or delete the row.") from error
