"""Safetensors files, written and read tensor by tensor: memory is bounded by one tensor, whatever the file's size."""

import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from valign.checks import UserError
from valign.files import atomic_path
from valign.models.files.tensor_header import TensorHeader

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
NAMED = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class TensorShape:
    """What a file says of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * prod(self.shape)


def stream_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]], metadata: Callable[[], Mapping[str, str]] = dict) -> None:
    """Write ``(name, tensor)`` pairs to ``path`` in the order given, atomically.

    The format puts the header first, so the bytes wait in an unnamed file beside ``path`` until every shape is known.

    Args:
        metadata: Called once, after the last tensor: the strings of the file's header.
    Raises: UserError if a name comes twice, or the disk is full.
    """
    header: dict[str, object] = {}
    with atomic_path(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as body:
        for name, tensor in tensors:
            if name in header:
                raise UserError(f"{path.name}: tensor names must be unique, got {name} twice. Name each module once.")
            data = tensor.detach().cpu().contiguous()
            start = body.tell()
            body.write(data.reshape(-1).view(torch.uint8).numpy().data)
            header[name] = {"dtype": DTYPES[data.dtype], "shape": list(data.shape), "data_offsets": [start, body.tell()]}
        body.seek(0)
        with temporary.open("wb") as file:
            file.write(_head(header, metadata()))
            shutil.copyfileobj(body, file, 1 << 20)


def write_known(
    path: Path, shapes: Mapping[str, TensorShape], make: Callable[[str], Tensor], *, before: Callable[[], None] = lambda: None
) -> None:
    """Write tensors of known dtypes and shapes, in the order of ``shapes``, atomically; each byte goes to disk once.

    Args:
        make: Called once per name; its tensor must have the dtype and shape that ``shapes`` says.
        before: Called when all are written, before the file has its name.
    Raises: UserError if the disk is full; what ``make`` raises, and then nothing is left behind.
    """
    header: dict[str, object] = {}
    end = 0
    for name, known in shapes.items():
        start, end = end, end + known.size
        header[name] = {"dtype": DTYPES[known.dtype], "shape": list(known.shape), "data_offsets": [start, end]}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(_head(header, {}))
        for name, known in shapes.items():
            data = make(name).detach().cpu().contiguous()
            assert (data.dtype, tuple(data.shape)) == (known.dtype, known.shape), name
            file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        before()


def _head(header: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """The format's length and header; the data starts on a multiple of 8 bytes."""
    text = json.dumps({**header, "__metadata__": {"format": "pt", **metadata}}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class TensorLocation(TensorShape):
    """Where a tensor lies in its file."""

    start: int  # bytes from the file's beginning


class TensorIndex:
    """The names, shapes and places of a file's tensors, checked by safetensors itself; `read` fetches one tensor.

    Unlike an open `safe_open`, it maps nothing into memory, so what was read can be forgotten; and it parses the header once.
    Raises: UserError as `TensorHeader` does.
    """

    def __init__(self, path: Path, header: TensorHeader | None = None) -> None:
        self.path, self.header = path, header or TensorHeader(path)
        self.metadata = self.header.metadata
        places = self.header.places.items()
        self.places = {name: TensorLocation(NAMED[place.dtype], place.shape, place.start) for name, place in places}

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        place = self.places[name]
        if place.size == 0:
            return torch.empty(place.shape, dtype=place.dtype)
        data = torch.empty(place.size, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(place.start)
            view, filled = data.numpy().data, 0
            while filled < place.size and (count := file.readinto(view[filled:])):
                filled += count
        if filled != place.size:
            raise UserError(f"{self.path} has changed while it was read. Run the command again.")
        return data.view(place.dtype).reshape(place.shape)
