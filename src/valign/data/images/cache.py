"""What every cache of latents shares: memory-mapped latents and texts, an index, and the record of the run that made it."""

from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from valign.checks import UserError
from valign.data.images.row_store import RowReader
from valign.files import read_json

Cache = TypeVar("Cache", bound="EncodedImages")


class EncodedImages:
    """Reads a finished folder of latents lazily: a batch touches only its own rows of the memory-mapped files."""

    content: ClassVar[str]  # as messages call it
    command: ClassVar[str]  # that makes such a folder
    step: ClassVar[str]  # of its `run.json`
    mirrored: ClassVar[str]  # what stands in the place of {} in the names of mirrored latents
    first: ClassVar[str]  # name of one latent, with {}

    def __init__(self, folder: Path) -> None:
        """Args: folder: ``D/latents``, finished. Raises: UserError if it is not."""
        self.record: dict[str, Any] = read_json(folder / "run.json")
        if self.record.get("status") != "done":
            raise UserError(f"{folder} is unfinished. Run `{self.command}` again with the same options; it resumes.")
        self.table: dict[str, list[Any]] = pq.read_table(folder / "index.parquet").to_pydict()
        self.folder = folder
        self.base_fingerprint: str = self.record["inputs"]["model"]
        self.ids: tuple[str, ...] = tuple(self.table["id"])
        self.text_rows: Int[Tensor, " row"] = torch.tensor(self.table["text_row"], dtype=torch.long)
        self._latents, self._text = RowReader(folder / "latents.safetensors"), RowReader(folder / "text.safetensors")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_flip(self) -> bool:
        """Whether the mirrored images were encoded too."""
        return self.first.format(self.mirrored) in self._latents.names

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(channel, height, width)``."""
        _, channel, height, width = self._latents.shape(self.first.format(""))
        return channel, height, width

    def fingerprint(self) -> str:
        """SHA-256 of everything that the cache was made from: model, precision, images and texts."""
        return str(self.record["key"])

    def _read(self, name: str, rows: Int[Tensor, " row"], flip: Bool[Tensor, " row"]) -> Tensor:
        """Latents ``name`` of ``rows``, in that order; ``flip`` picks the mirrored. Raises: UserError if none are cached."""
        rows, flip = rows.cpu(), flip.cpu()
        if flip.any() and not self.has_flip:
            raise UserError(f"{self.folder} holds no mirrored latents. Build the data with flip on, or train with flip off.")
        out = torch.empty(len(rows), *self.latent_shape)
        for state, chosen in (("", ~flip), (self.mirrored, flip)):
            if chosen.any():
                out[chosen] = self._latents.read(name.format(state), rows[chosen])
        return out

    def _texts(self, text_rows: Int[Tensor, " text"]) -> dict[str, Tensor]:
        """Keyword arguments of a model's conditioning: ``embeds [text, tokens, dim]``, SDXL's ``pooled`` and ``time_ids`` too."""
        return {name: self._text.read(name, text_rows) for name in self._text.names}


def open_cache(kind: type[Cache], folder: Path, data: Path, base: str | None) -> Cache:
    """The cache in ``folder`` of data set ``data``. Args: base: fingerprint of the model that will be trained, if known.

    Raises: UserError if the cache is missing, unfinished, or was encoded by another base model.
    """
    if not (folder / "run.json").exists() or read_json(folder / "run.json").get("step") != kind.step:
        raise UserError(f"{data} holds no {kind.content}. Make them with `{kind.command} -o {data}`.")
    cache = kind(folder)
    if base is not None and base != cache.base_fingerprint:
        raise UserError(
            f"{folder} was encoded by base model {cache.base_fingerprint[:12]}, the model given is {base[:12]}. "
            "Build the data again with this model, or train the model that made them."
        )
    return cache
