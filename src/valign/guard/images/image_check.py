"""The image check: a detector's verdict before an image is handed out. A detector that fails and an all-black image are errors."""

import numpy as np
from PIL.Image import Image

from valign.guard.records import Verdict
from valign.interfaces import Detector

NAME = "image"


def check_image(detector: Detector, image: Image) -> Verdict:
    """A verdict at level "image": class and score of the highest column; it fires from the detector's own threshold on."""
    card = detector.card
    try:
        if not np.asarray(image.convert("L")).any():
            return Verdict(
                stage=NAME, level="image", outcome="error", message="an all-black image: a numerical failure, or already hidden"
            )
        row = np.asarray(detector.detect([image]), dtype=np.float64).reshape(-1)
        if len(row) != len(card.classes) or not ((row >= 0) & (row <= 1)).all():
            raise ValueError("a detector must give one score in [0, 1] per class")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # libraries in other languages raise more than `Exception`
        return Verdict(stage=NAME, level="image", outcome="error", message=f"{card.name} failed: {type(error).__name__}")
    best = int(row.argmax())
    return Verdict(
        stage=NAME,
        level="image",
        outcome="fire" if row[best] >= card.threshold else "pass",
        category=card.classes[best] if row[best] >= card.threshold else "",
        score=float(row[best]),
        threshold=card.threshold,
        scores=dict(zip(card.classes, row.tolist())),
        message=f"{card.name} {card.weights_sha256[:12]}",
    )
