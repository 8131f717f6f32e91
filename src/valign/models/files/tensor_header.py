"""The header of a safetensors file: names, dtypes, shapes and places of its tensors, without torch and without the tensors."""

import json
import struct
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from valign.checks import UserError

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "BOOL": 1}  # of a number, by the dtypes that are read
FORMS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in its file."""

    dtype: str  # a key of `BYTES`
    shape: tuple[int, ...]
    start: int  # bytes from the file's beginning

    @property
    def size(self) -> int:
        """Bytes."""
        return BYTES[self.dtype] * prod(self.shape)


class TensorHeader:
    """The header of a file, checked by safetensors itself.

    Raises: UserError if the file is broken or holds a dtype that adapters do not have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="numpy"):  # validates header, offsets and length
                pass
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}. Make or download it again.") from error
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.places: dict[str, TensorPlace] = {}
        for name, entry in sorted(header.items()):
            if entry["dtype"] not in BYTES:
                raise UserError(f"{path}: {name} must be {', '.join(BYTES)}, got {entry['dtype']}. Convert the file first.")
            start, _ = entry["data_offsets"]
            self.places[name] = TensorPlace(entry["dtype"], tuple(entry["shape"]), 8 + length + start)

    def number(self, name: str) -> float:
        """The one number of a tensor. Raises: UserError unless it is one finite number."""
        place = self.places[name]
        found = float("nan")
        if prod(place.shape) == 1:
            with self.path.open("rb") as file:
                file.seek(place.start)
                data = file.read(place.size)
            if place.dtype == "BF16":  # the upper half of a float32
                data = b"\0\0" + data
            (found,) = struct.unpack("<f" if place.dtype == "BF16" else FORMS.get(place.dtype, "<?"), data)
        if not isfinite(found):
            raise UserError(f"{self.path}: {name} must be one finite number, got shape {place.shape}. Save the file again.")
        return float(found)
