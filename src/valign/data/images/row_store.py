"""Tensors that share their first axis, in one safetensors file: written block by block, read row by row.

The safetensors format is an 8-byte length, a JSON header and raw bytes, so a block of rows has a known place in the
file. That lets a cache of many gigabytes be written with the memory of one block, resumed after a kill, and read
through a memory map that touches only the rows asked for. The finished file opens with the safetensors library too.
"""

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from valign.checks import UserError

CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
RAW: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<u4"),
    "F16": np.dtype("<u2"),
    "BF16": np.dtype("<u2"),
}  # bits only; NumPy has no bfloat16


class RowWriter:
    """Fills ``path`` (a temporary name until `close`) with blocks of rows. Reopening an unfinished file continues it."""

    def __init__(self, path: Path, rows: int, like: Mapping[str, Tensor]) -> None:
        """Args: rows: length of the first axis in the finished file. like: name -> a tensor with the right dtype and row shape."""
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        header: dict[str, dict[str, object]] = {}
        end = 0
        for name in sorted(like):
            shape = [rows, *like[name].shape[1:]]
            start, end = end, end + prod(shape) * like[name].element_size()
            header[name] = {"dtype": CODES[like[name].dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the data start on a multiple of 8 bytes
        self.header, self.start = header, 8 + len(text)
        opening = len(text).to_bytes(8, "little") + text
        try:
            if not self.partial.exists():
                self.partial.write_bytes(opening)
            self.file = self.partial.open("r+b")
            if self.file.read(len(opening)) != opening:
                raise UserError(f"{self.partial} was begun with other shapes. Delete it and run the step again.")
            self.file.truncate(self.start + end)
        except OSError as error:
            raise _disk(self.partial, error) from error

    def write(self, row: int, block: Mapping[str, Tensor]) -> None:
        """Put ``block`` (name -> ``[n, ...]``) at rows ``row .. row + n`` and wait until the disk has it."""
        try:
            for name, tensor in block.items():
                offset = self.header[name]["data_offsets"][0]  # type: ignore[index]
                data = tensor.detach().cpu().contiguous()
                self.file.seek(self.start + offset + row * data[0].numel() * data.element_size())
                self.file.write(data.view(torch.uint8).numpy().tobytes())
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise _disk(self.partial, error) from error

    def close(self) -> None:
        """Give the finished file its name."""
        self.file.close()
        os.replace(self.partial, self.path)


class RowReader:
    """Reads rows of a safetensors file through a memory map; nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        """Raises: UserError if the file is missing, no safetensors file, or shorter than its header says."""
        if not path.exists():
            raise UserError(f"{path} does not exist. Make it with `valign data build`, or check the path.")
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(size)) if size < path.stat().st_size else {}
                header.pop("__metadata__", None)
                known = bool(header) and all(entry["dtype"] in RAW for entry in header.values())
            except (ValueError, AttributeError, TypeError, KeyError):
                known = False
        if not known:
            raise UserError(f"{path} is not a safetensors file of floats. Delete it and make it again.")
        if path.stat().st_size < 8 + size + max(entry["data_offsets"][1] for entry in header.values()):
            raise UserError(f"{path} is shorter than its header says. Delete it and make it again.")
        self._maps = {
            name: np.memmap(path, RAW[entry["dtype"]], "r", 8 + size + int(entry["data_offsets"][0]), tuple(entry["shape"]))
            for name, entry in header.items()
        }
        codes = {code: dtype for dtype, code in CODES.items()}
        self.dtypes = {name: codes[entry["dtype"]] for name, entry in header.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, sorted."""
        return tuple(sorted(self._maps))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._maps[name].shape

    def read(self, name: str, rows: Int[Tensor, " row"]) -> Tensor:
        """``[row, ...]``, in the order asked for, in the dtype of the file."""
        bits = np.ascontiguousarray(self._maps[name][rows.cpu().numpy()])
        return torch.from_numpy(bits.view(bits.dtype.str.replace("u", "i"))).view(self.dtypes[name])


def _disk(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} could not be written: {error.strerror or error}. Free some space and run the step again; it resumes.")
