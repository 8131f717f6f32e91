"""Fréchet distance of two feature sets (FID, arXiv 1706.08500), in float64 and without a matrix square root that may fail.

The estimate is biased: it falls as the sets grow. So only sets of one size are compared, and below 2048 images
the covariance of Inception features is rank-deficient and the number serves for comparison within a report only.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from valign.methods import Method

METHOD = Method(
    slug="fid",
    title="Fréchet distance of image features",
    paper="arXiv 1706.08500",
    room="evaluation",
    entry="valign.evaluation.images.frechet:frechet_distance",
    fidelity="exact",
    note="the formula in float64; features are the caller's, Inception's only where the caller has them",
)
FEW = 2048  # images below which published tools call the covariance too poor


@dataclass(frozen=True)
class FeatureMoments:
    """Mean and covariance (divided by n - 1) of ``count`` feature rows, float64."""

    mean: Float[np.ndarray, " dim"]
    covariance: Float[np.ndarray, "dim dim"]
    count: int


def gaussian_of(features: Float[np.ndarray, "image dim"]) -> FeatureMoments:
    """Mean and covariance of features; at least two rows, all finite."""
    values = np.asarray(features, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"gaussian_of.features must be at least 2 finite rows, got {len(values)} rows. Generate more images.")
    return FeatureMoments(values.mean(0), np.atleast_2d(np.cov(values, rowvar=False)), len(values))


def gaussian_distance(first: FeatureMoments, second: FeatureMoments) -> float:
    """``|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1^1/2 C2 C1^1/2)^1/2)``, the last trace as the sum of root eigenvalues.

    Eigenvalues of symmetric matrices are real; rounding below zero is cut off, so singular covariances need no jitter.
    """
    root = _root(first.covariance)
    inner = np.linalg.eigvalsh(root @ second.covariance @ root)
    shift = first.mean - second.mean
    trace = np.trace(first.covariance) + np.trace(second.covariance) - 2 * np.sqrt(inner.clip(min=0)).sum()
    return max(0.0, float(shift @ shift + trace))


def frechet_distance(first: Float[np.ndarray, "image dim"], second: Float[np.ndarray, "other dim"]) -> float:
    """FID of two sets of equal size; ValueError otherwise, for the bias depends on the size."""
    if len(first) != len(second):
        raise ValueError(
            f"frechet_distance must get sets of one size, got {len(first)} and {len(second)} rows. Cut the larger one."
        )
    return gaussian_distance(gaussian_of(first), gaussian_of(second))


def size_warning(count: int, dim: int) -> str:
    """What to say of a distance from ``count`` rows of ``dim`` features; empty when there is nothing to say."""
    if count <= dim:
        return f"FID from {count} images and {dim} features: the covariance is rank-deficient. Compare within this report only."
    if count < FEW:
        return f"FID from {count} images, fewer than {FEW}: biased upwards. Compare within this report only."
    return ""


def _root(covariance: Float[np.ndarray, "dim dim"]) -> Float[np.ndarray, "dim dim"]:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
