"""What every harm detector shares: checked scores, measured errors, pinned weights."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from PIL.Image import Image

from valign.checks import UserError
from valign.files import hash_file, hash_value
from valign.interfaces import Detector, DetectorCard, scores_of

WEIGHT_SUFFIXES = (".safetensors", ".onnx")


def flagged(scores: Float[np.ndarray, "image class"], card: DetectorCard) -> Bool[np.ndarray, " image"]:
    """Which images are harmful: any class at or above the threshold, or without a number."""
    return np.asarray(~(scores < card.threshold).all(axis=1))


def measure_error(detector: Detector, images: Sequence[Image], harmful: Sequence[bool]) -> DetectorCard:
    """The detector's card with the sensitivity and specificity seen on labelled images.

    Raises: ValueError without images of both sorts: there is no error rate of nothing.
    """
    truth = np.asarray(harmful, dtype=bool)
    if len(truth) != len(images) or truth.all() or not truth.any():
        raise ValueError(
            f"measure_error.harmful must label {len(images)} images, some harmful and some not; "
            f"got {len(truth)} labels, {int(truth.sum())} of them harmful. Add images of the missing sort."
        )
    found = flagged(scores_of(detector, images), detector.card)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    return replace(
        detector.card,
        sensitivity=float(found[truth].mean()),
        specificity=float((~found[~truth]).mean()),
        positives=positives,
        negatives=negatives,
    )


def hash_weights(folder: Path) -> str:
    """One SHA-256 over every weight file below ``folder``, by name and content. Pickled weights are not read."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in WEIGHT_SUFFIXES)
    if not files:
        raise UserError(
            f"{folder} must hold {' or '.join(WEIGHT_SUFFIXES)} weights, found none. Convert pickled weights to safetensors first."
        )
    return hash_value({str(path.relative_to(folder)): hash_file(path) for path in files})


def check_pin(name: str, found: str, pinned: str | None) -> None:
    """Refuse weights whose SHA-256 differs from the one that the user pinned."""
    if pinned is not None and found != pinned:
        raise UserError(
            f"{name} weights must have SHA-256 {pinned}, got {found}. Restore the pinned file, or pin the new one on purpose."
        )
