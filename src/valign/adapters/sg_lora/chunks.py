"""A flat vector of parameters as the rows that SG-LoRA's network reads: in one piece, or a row for each adapted layer."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from valign.adapters.sg_lora.library import DOWN, UP, LoraSchema

Chunk = Literal["none", "layer"]


@dataclass(frozen=True)
class Chunks:
    """Which numbers of the vector are in which row; rows of layers with fewer numbers end in padding."""

    places: Int[Tensor, "chunk width"]  # -1 is padding

    @classmethod
    def of(cls, schema: LoraSchema, chunk: Chunk) -> "Chunks":
        """``"none"`` is one row of P numbers; ``"layer"`` a row for the two factors of each layer, in the schema's order."""
        if chunk == "none":
            return cls(torch.arange(schema.size)[None])
        layers: dict[str, list[Tensor]] = {}
        for name, part in zip(schema.shapes, torch.arange(schema.size).split(schema.sizes), strict=True):
            layers.setdefault(name.removesuffix(DOWN).removesuffix(UP), []).append(part)
        return cls(pad_sequence([torch.cat(parts) for parts in layers.values()], batch_first=True, padding_value=-1))

    @property
    def counted(self) -> Bool[Tensor, "chunk width"]:
        """Where there is no padding."""
        return self.places >= 0

    def split(self, vectors: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch chunk width"]:
        """Padding is 0."""
        return vectors[..., self.places] * self.counted

    def join(self, rows: Float[Tensor, "chunk width"]) -> Float[Tensor, " size"]:
        """The inverse of `split`; what stands in the padding is dropped."""
        found = rows[self.counted]
        return torch.empty_like(found).index_put_((self.places[self.counted],), found)
