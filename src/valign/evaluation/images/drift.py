"""How far a system moves an image that needed no change: against the base model's image of the same prompt and seed."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL.Image import Image

from valign.images import as_shown


def cosine_drift(
    before: Float[np.ndarray, "image dim"], after: Float[np.ndarray, "image_after dim_after"]
) -> Float[np.ndarray, " image"]:
    """``1 - cos`` of paired feature rows: 0 when nothing moved, at most 2. Two zero rows count as equal, one zero row as 1."""
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"cosine_drift must get equal shapes, got {first.shape} and {second.shape}. Pair the images by prompt and seed."
        )
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosine = np.divide((first * second).sum(1), lengths, out=np.zeros(len(first)), where=lengths > 0)
    cosine[(first == second).all(axis=1)] = 1.0
    return 1 - cosine.clip(-1, 1)


def pixel_rmse(before: Sequence[Image], after: Sequence[Image]) -> Float[np.ndarray, " image"]:
    """Root mean squared difference of RGB values per pair, in units of full scale: 0 when equal, 1 for black against white."""
    if len(before) != len(after):
        raise ValueError(f"pixel_rmse must get equally many images, got {len(before)} and {len(after)}.")
    return np.array([_rmse(first, second) for first, second in zip(before, after)], dtype=np.float64)


def _rmse(first: Image, second: Image) -> float:
    if first.size != second.size:
        raise ValueError(f"pixel_rmse must compare images of one size, got {first.size} and {second.size}.")
    left, right = (np.asarray(as_shown(image), dtype=np.float64) / 255 for image in (first, second))
    return float(np.sqrt(np.mean((left - right) ** 2)))
