"""Images with captions for fine-tuning a diffusion model: from a table, or a folder of a trainer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError
from valign.data.prompts.tables import AS_IT_IS, TableReading
from valign.data.tasks.base import Task, TaskData, assemble
from valign.data.tasks.image_folders import list_images
from valign.images import image_tensor, open_image


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

    @property
    def extent(self) -> tuple[int, int] | None:
        """Width and height in pixels, where the image is to be kept in its shape; None is square."""
        return None

    @abstractmethod
    def pixels(self, size: int) -> Float[Tensor, "3 {size} {size}"]:
        """The image in [-1, 1]."""

    def pixels_in(self, width: int, height: int) -> Float[Tensor, "3 {height} {width}"]:
        """The image in [-1, 1], scaled to cover the size and cropped about its middle; of images with an `extent`."""
        raise TypeError(f"{type(self).__name__} has no extent, so it is read by pixels().")


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
    """The image is a file, or the bytes of one; ``digest`` is its SHA-256."""

    source: Path | bytes
    size_shown: tuple[int, int]  # width and height, pixels

    @property
    def extent(self) -> tuple[int, int]:
        return self.size_shown

    def pixels(self, size: int) -> Float[Tensor, "3 {size} {size}"]:
        """As `image_tensor` makes it. Raises: UserError if the file has gone since it was listed."""
        return self.pixels_in(size, size)

    def pixels_in(self, width: int, height: int) -> Float[Tensor, "3 {height} {width}"]:
        try:
            return image_tensor(open_image(self.source), width, height)
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
    reading: TableReading = AS_IT_IS,
    skip_unreadable: bool = False,
) -> TaskData:
    """Training and judging rows, as `valign.data.tasks.texts.read_data` makes them of texts.

    Args:
        train, held_out: A table or a folder, as `valign.data.tasks.image_folders.list_images` takes them, and ``skip_unreadable``.
    Raises: UserError as `list_images`.
    """
    rows, others = (
        read_caption_rows(place, task, reading=reading, skip_unreadable=skip_unreadable) if place else []
        for place in (train, held_out)
    )
    data = assemble(task, train, rows, others, share=share, train_rows=train_rows, held_out_rows=held_out_rows, seed=seed)
    return replace(data, held_out=tuple(dict.fromkeys(data.held_out)))  # repeats are for training


def read_caption_rows(
    place: Path, task: CaptionTask, *, reading: TableReading = AS_IT_IS, skip_unreadable: bool = False
) -> list[CaptionRow]:
    """Every image of a table or a folder, as often as its folder repeats it. Raises: UserError as `list_images`."""
    listed = list_images(place, task.image, task.caption, reading=reading, skip_unreadable=skip_unreadable)
    return [row for one in listed for row in one.repeats * [CaptionRow(one.caption, one.digest(), one.source, one.extent)]]
