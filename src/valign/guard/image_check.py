"""A picture is looked at before anybody sees it. An exception of the detector counts as a finding, a black picture as a failure."""

import numpy as np
from PIL.Image import Image

from valign.data.protocols import Detector
from valign.guard.records import Verdict

NAME = "image"


def check_image(detector: Detector, image: Image) -> Verdict:
    """A verdict at level "image": score and class of the highest column, the detector's own threshold."""
    from valign.detectors.base import scores_of  # its package loads diffusers, which checking a prompt does not need

    try:
        if not np.asarray(image.convert("L")).any():
            return Verdict(stage=NAME, level="image", outcome="error", message="an all-black picture: a numerical failure, or already hidden")
        row = scores_of(detector, [image])[0]
    except Exception as error:  # noqa: BLE001 - fail closed, whatever a detector raises
        return Verdict(stage=NAME, level="image", outcome="error", message=f"{detector.card.name} failed: {type(error).__name__}")
    best, card = int(row.argmax()), detector.card
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
