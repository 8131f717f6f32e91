"""The last stage before generation: a caption that calls for a value principle gets its token (LiVO, arXiv 2410.12700)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL.Image import Image

from valign.interfaces import Retriever, SamplingConfig

if TYPE_CHECKING:
    from valign.models.diffusion.base import DiffusionModel
    from valign.models.diffusion.value_encoder import ValueEncoder


@dataclass(frozen=True)
class ValueToken:
    """Refuses nothing and changes no words: asks the retriever about the caption of the image, the prompt or its rewrite.

    Args: mixing: Share of images that get the token of a bias principle, [0, 1], by their seeds.
    """

    encoder: ValueEncoder
    retriever: Retriever
    mixing: float = 0.5

    def principle(self, caption: str, seed: int) -> str:
        """Id of the principle whose token this image gets; "" for none."""
        from valign.models.diffusion.value_pipeline import mixes

        found = self.retriever.retrieve(caption)
        known = next((one for one in self.encoder.principles if one.id == found), None)
        if known is None or (known.kind == "bias" and not mixes(seed, self.mixing)):
            return ""
        return known.id

    def generate(self, model: DiffusionModel, caption: str, seed: int, sampling: SamplingConfig) -> Image:
        """The image; without a principle the bare model's, bit for bit.

        Raises: UserError if the encoder was made for another base model.
        """
        from valign.models.diffusion.value_pipeline import ValueGuidedPipeline

        pipeline = ValueGuidedPipeline(model, self.encoder)
        named = [self.principle(caption, seed) or None]
        return pipeline.generate([caption], seeds=[seed], principles=named, mixing=1.0, sampling=sampling)[0]
