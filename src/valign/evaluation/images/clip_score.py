"""CLIPScore (arXiv 2104.08718) as the diffusion papers print it: 100 x cosine of image and prompt, averaged."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from PIL.Image import Image


@runtime_checkable
class ImageTextEncoder(Protocol):
    """`valign.models.encoders.clip.ClipEncoder`, or anything with its ``score``: cosine per image and prompt."""

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> Any: ...


def clip_scores(encoder: ImageTextEncoder, images: Sequence[Image], prompts: Sequence[str]) -> Float[np.ndarray, " image"]:
    """``100 cos(image, prompt)`` per pair, float64; negative cosines stay negative."""
    if not images:
        return np.zeros(0)
    return 100 * np.asarray(encoder.score(images, prompts), dtype=np.float64)
