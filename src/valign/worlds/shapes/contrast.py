"""The oracle as a judge of social bias in value data: does the figure have the head that the text names?

The world's CLIP is too small to see heads; a published one is not, and judges by itself (`value_images.Contrast`).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL.Image import Image

from valign.detectors.oracle import OracleDetector
from valign.worlds.shapes.suite import heads
from valign.worlds.shapes.vocabulary import HEADS


class HeadContrast:
    """1 where an image's figure has the head that its text names, else 0; texts without a head fit no image."""

    def __init__(self, oracle: OracleDetector) -> None:
        self.oracle = oracle
        self.weights_sha256: str = oracle.card.weights_sha256

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> Float[np.ndarray, " image"]:
        shown = [heads(reading) for reading in self.oracle.read(images)]
        return np.array([float(head >= 0 and HEADS[head] in text) for head, text in zip(shown, prompts, strict=True)])
