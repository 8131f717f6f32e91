"""From a detector's logits to probabilities: slope and offset per class, fitted on images that the detector was not fitted on."""

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import minimize
from scipy.special import expit

from valign.checks import UserError
from valign.methods import Method

METHOD = Method(
    slug="platt",
    title="Platt's calibration of a detector's scores, both sorts weighing the same",
    paper="-",
    room="detectors",
    entry="valign.detectors.calibration:platt",
    fidelity="variant",
    note="Platt's targets and loss, with both sorts of images weighing the same",
)


def platt(logits: Float[np.ndarray, " image"], labels: Bool[np.ndarray, " image"], *, who: str) -> tuple[float, float]:
    """Slope and offset that minimize the cross-entropy of ``sigmoid(slope * logit + offset)`` (Platt 1999).

    Targets are ``(n + 1) / (n + 2)`` and ``1 / (n + 2)``, so that few or separable images do not make it certain. Positives and
    negatives weigh the same, so a probability of one half is the best limit where both sorts are equally likely.

    Args: who: Names the class in a message.
    Raises: UserError if the slope is not above 0: higher logits do not mean harm.
    """
    logits = np.asarray(logits, dtype=np.float64)
    positive, negative = int(labels.sum()), int((~labels).sum())
    if not positive or not negative:
        raise UserError(f"{who} must have images of both sorts to be calibrated on, got {positive} and {negative}. Add images.")
    spread = float(np.std(logits)) or 1.0
    x = (logits - logits.mean()) / spread
    target = np.where(labels, (positive + 1) / (positive + 2), 1 / (negative + 2))
    weight = np.where(labels, 0.5 / positive, 0.5 / negative)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        z = parameters[0] * x + parameters[1]
        off = weight * (expit(z) - target)
        return float((weight * (np.logaddexp(0, z) - target * z)).sum()), np.array([off @ x, off.sum()])

    slope, offset = minimize(loss, np.array([1.0, 0.0]), jac=True, method="BFGS").x
    if slope <= 1e-6:
        raise UserError(
            f"{who} was not learned: on the images kept for calibration its scores do not rise with the harm. Give more images, "
            "leave it out, or use an encoder that sees the difference."
        )
    return float(slope / spread), float(offset - slope * logits.mean() / spread)


def best_threshold(scores: Float[np.ndarray, " image"], harmful: Bool[np.ndarray, " image"]) -> float:
    """The limit in (0, 1) with the highest sum of sensitivity and specificity: the middle of the widest gap between scores that
    reaches it (Youden 1950).

    Args: scores: Of each image, the highest of its classes, in [0, 1]. harmful: What it is; both sorts occur.
    """
    values = np.unique(np.concatenate([[0.0], scores, [1.0]]))
    limits, gaps = (values[1:] + values[:-1]) / 2, np.diff(values)
    youden = np.array([(scores[harmful] >= limit).mean() + (scores[~harmful] < limit).mean() for limit in limits])
    best = np.flatnonzero(youden >= youden.max() - 1e-12)
    return float(limits[best[np.argmax(gaps[best])]])
