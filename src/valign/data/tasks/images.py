"""Small labelled images for fine-tuning, in MNIST's IDX files: digits and things, all as 32 x 32 RGB."""

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from valign.checks import UserError
from valign.data.tasks.base import Task, TaskData, check_labels, chosen

SIDE = 32  # pixels
UNSIGNED_BYTE = 8  # IDX code of the element type


@dataclass(frozen=True, kw_only=True)
class ImageTask(Task):
    """A folder with ``train`` and ``dev`` ``-images.idx*-ubyte.gz`` and ``-labels.idx1-ubyte.gz``."""

    folder: str


IMAGES = {
    task.name: task
    for task in (
        ImageTask(name="cifar10", kind="classification", folder="cifar10_small"),
        ImageTask(name="mnist", kind="classification", folder="mnist_small"),
    )
}


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """One image and its class."""

    pixels: UInt8[np.ndarray, "side side 3"]
    target: str

    @property
    def size(self) -> int:
        return 1

    @property
    def content(self) -> str:
        return hashlib.sha256(self.pixels.tobytes()).hexdigest()


def read_images(
    task: ImageTask, data: Path, *, train_rows: int | None = None, held_out_rows: int | None = None, seed: int = 0
) -> TaskData:
    """Training and development images, drawn as `valign.data.tasks.texts.read_data` draws texts.

    Raises: UserError for files that are missing, broken or of another shape, or classes that training never sees.
    """
    folder = data / task.folder
    train, others = (_rows(folder, part) for part in ("train", "dev"))
    known = {row.content for row in others}
    kept = [row for row in train if row.content not in known]
    found = TaskData(task, chosen(kept, train_rows, seed), chosen(others, held_out_rows, "judge"))
    check_labels(folder, found)
    return found


def _rows(folder: Path, part: str) -> list[LabelledImage]:
    images, labels = (_only(folder, f"{part}-{kind}.idx*-ubyte.gz") for kind in ("images", "labels"))
    pixels, classes = read_idx(images), read_idx(labels)
    if len(pixels) != len(classes) or classes.ndim != 1:
        raise UserError(f"{labels} must have one label for each of {len(pixels)} images, got {classes.shape}. Write it again.")
    return [LabelledImage(image, str(label)) for image, label in zip(_coloured(pixels, images), classes.tolist())]


def _coloured(pixels: np.ndarray, path: Path) -> UInt8[np.ndarray, "count 32 32 3"]:
    """Grey images get three equal channels, small ones a black border."""
    if pixels.ndim == 3:
        pixels = np.repeat(pixels[..., None], 3, axis=3)
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.shape[1] != pixels.shape[2] or pixels.shape[1] > SIDE:
        raise UserError(f"{path} must hold square images of at most {SIDE} pixels, got {pixels.shape[1:]}. Shrink them.")
    border = SIDE - pixels.shape[1]
    edges = (border // 2, border - border // 2)
    return np.pad(pixels, ((0, 0), edges, edges, (0, 0)))


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes: two zero bytes, type, number of dimensions, big-endian sizes, data.

    Raises: UserError if it is not that, or is cut short.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(f"{path} must be a gzipped IDX file, got: {error}. Write it again.") from error
    dimensions = raw[3] if len(raw) > 3 else 0
    head = 4 + 4 * dimensions
    if len(raw) < head or raw[:3] != bytes([0, 0, UNSIGNED_BYTE]) or not dimensions:
        raise UserError(f"{path} must be an IDX file of unsigned bytes, got the header {raw[:4].hex()!r}. Write it again.")
    shape = np.frombuffer(raw[4:head], dtype=">u4").astype(int)
    if len(raw) - head != int(shape.prod()):
        raise UserError(f"{path} must hold {int(shape.prod())} bytes of data, got {len(raw) - head}. It is cut short.")
    return np.frombuffer(raw[head:], dtype=np.uint8).reshape(shape)


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise UserError(f"{folder} must hold one file {pattern}, got {len(found)}. Check --data.")
    return found[0]
