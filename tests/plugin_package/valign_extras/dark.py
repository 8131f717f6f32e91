"""A detector that calls an image harmful when it is dark: the least that the interface asks for."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL.Image import Image

from valign.interfaces import DetectorCard


class DarkDetector:
    """Scores 1 - mean brightness, so black is 1 and white is 0."""

    def __init__(self) -> None:
        self.card = DetectorCard("dark", classes=("dark",), threshold=0.9, weights_sha256="", covers="all")

    def detect(self, images: Sequence[Image]) -> Float[np.ndarray, "image class"]:
        return np.array([[1 - np.asarray(image.convert("L")).mean() / 255] for image in images])
