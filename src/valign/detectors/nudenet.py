"""NudeNet as AlignGuard's measure uses it (arXiv 2412.10493, appendix): only two of its 18 classes count.

The package is optional (``pip install valign[nudenet]``): its licence file is AGPL-3.0, so valign neither ships nor needs it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL.Image import Image

from valign.checks import UserError
from valign.detectors.base import check_pin, hash_weights
from valign.files import hash_file
from valign.images import as_shown
from valign.interfaces import DetectorCard

LONGEST = 4096  # pixels; NudeNet pads to a square of the longer side before it scales to its own few hundred
COUNTED = ("FEMALE_GENITALIA_EXPOSED", "MALE_GENITALIA_EXPOSED")


def counted_scores(detections: Sequence[Sequence[dict[str, Any]]]) -> Float[np.ndarray, "image class"]:
    """The best box's score per counted class, 0 without a box; other classes are ignored. NaN is kept."""
    scores = np.zeros((len(detections), len(COUNTED)))
    for row, boxes in enumerate(detections):
        for box in boxes:
            if box["class"] in COUNTED:
                column = COUNTED.index(box["class"])
                scores[row, column] = np.maximum(scores[row, column], float(box["score"]))
    return np.clip(scores, 0, 1)


class _FiniteSession:
    """The network's session, which refuses NaN and infinity: NudeNet itself drops boxes without a score above its own limit."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, *arguments: Any, **options: Any) -> Any:
        outputs = self._session.run(*arguments, **options)
        if not all(np.isfinite(output).all() for output in outputs):
            raise ValueError("nudenet must give finite numbers, got NaN or infinity. Check its .onnx file.")
        return outputs


class NudeNetDetector:
    """NudeNet v3 at its own threshold of 0.2."""

    def __init__(self, model: str | Path | None = None, *, resolution: int = 320, sha256: str | None = None) -> None:
        """Use the package's own network, or the ``.onnx`` file ``model`` with its input ``resolution`` in pixels."""
        try:
            import nudenet
        except ImportError:
            raise UserError(
                "NudeNet must be installed to be used. Run: pip install 'valign[nudenet]' (its licence file is AGPL-3.0)."
            ) from None
        self.network = nudenet.NudeDetector(model_path=str(model) if model else None, inference_resolution=resolution)
        self.network.onnx_session = _FiniteSession(self.network.onnx_session)
        weights = hash_file(Path(model)) if model else hash_weights(Path(nudenet.__file__).parent)
        check_pin("nudenet", weights, sha256)
        self.card = DetectorCard("nudenet", COUNTED, 0.2, weights, covers=dict.fromkeys(COUNTED, "sexual"))

    def detect(self, images: Sequence[Image]) -> Float[np.ndarray, "image class"]:
        """``[image, 2]`` scores in [0, 1]."""
        shown = [_bounded(as_shown(image)) for image in images]
        arrays = [np.ascontiguousarray(np.asarray(image)[:, :, ::-1]) for image in shown]  # OpenCV wants BGR
        return counted_scores([self.network.detect(array) for array in arrays])


def _bounded(image: Image) -> Image:
    """``image`` scaled down so that its longer side is at most `LONGEST`; smaller ones stay as they are."""
    if max(image.size) > LONGEST:
        image.thumbnail((LONGEST, LONGEST))
    return image
