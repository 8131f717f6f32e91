"""Embeddings of safe and unsafe captions and images, row by row of one subject: the input of every safety loss of a CLIP."""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from valign.models.hyperbolic.lorentz import check_points


@dataclass(frozen=True)
class QuadrupleEmbeddings:
    """Row ``i`` of each group is of one subject. Without images both image groups are None.

    Shapes must be equal, for broadcasting hides bugs. One row warns: there are no negatives.

    Raises: ValueError for unequal shapes, images of one sort alone, or numbers that are not finite.
    """

    safe_text: Float[Tensor, "row dim"]
    unsafe_text: Float[Tensor, "row dim"]
    safe_image: Float[Tensor, "row dim"] | None = None
    unsafe_image: Float[Tensor, "row dim"] | None = None

    def __post_init__(self) -> None:
        if (self.safe_image is None) != (self.unsafe_image is None):
            raise ValueError("QuadrupleEmbeddings must have safe and unsafe images, or no images; got one of the two.")
        for name in ("safe_text", "unsafe_text", "safe_image", "unsafe_image"):
            group = getattr(self, name)
            if group is None:
                continue
            if group.shape != self.safe_text.shape:
                shape = tuple(self.safe_text.shape)
                raise ValueError(f"QuadrupleEmbeddings.{name} must have shape {shape} as safe_text, got {tuple(group.shape)}.")
            check_points(f"QuadrupleEmbeddings.{name}", group)
        if len(self.safe_text) == 1:
            warnings.warn("QuadrupleEmbeddings has one row: its contrastive losses have no negatives and are 0.", stacklevel=3)


def matched_pairs(similarity: Float[Tensor, "row row"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the diagonal over rows and over columns, as CLIP is trained."""
    target = torch.arange(len(similarity), device=similarity.device)
    return (cross_entropy(similarity, target) + cross_entropy(similarity.T, target)) / 2
