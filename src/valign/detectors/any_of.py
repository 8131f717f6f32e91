"""Several detectors as one: harmful when any of them says so. Inappropriate probability in the papers is Q16 or NudeNet."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL.Image import Image

from valign.checks import UserError
from valign.files import hash_value
from valign.interfaces import Detector, DetectorCard, KeepsAnswers, scores_of


def to_half(
    scores: Float[np.ndarray, "image class"], threshold: float | Float[np.ndarray, " class"]
) -> Float[np.ndarray, "image class"]:
    """Bend scores to put ``threshold`` at 0.5: straight pieces through (0, 0), (threshold, 0.5), (1, 1). Order and NaN are kept.

    Args: threshold: Of all classes, or of each.
    """
    below = 0.5 * scores / threshold
    above = 0.5 + 0.5 * (scores - threshold) / np.maximum(1 - np.asarray(threshold), np.finfo(float).tiny)
    return np.where(scores >= threshold, np.maximum(above, 0.5), np.minimum(below, np.nextafter(0.5, 0)))


def _common_domain(detectors: Sequence[Detector]) -> tuple[str, ...]:
    """Origins that every detector with a domain accepts. Raises: UserError where there are none."""
    domains = [detector.card.domain for detector in detectors if detector.card.domain]
    common = tuple(origin for origin in domains[0] if all(origin in domain for domain in domains)) if domains else ()
    if domains and not common:
        names = " and ".join(detector.card.name for detector in detectors if detector.card.domain)
        raise UserError(f"Joined detectors must be able to judge the images of one model, but {names} have no origin in common.")
    return common


def parts_of(detector: Detector) -> tuple[Detector, ...]:
    """The detectors that were joined; the detector itself where it is a single one."""
    return detector.detectors if isinstance(detector, AnyOf) else (detector,)


class AnyOf:
    """Every class of every detector, named ``detector:class``, all thresholds bent to 0.5. Its error is unknown until measured."""

    def __init__(self, *detectors: Detector) -> None:
        if not detectors:
            raise ValueError("AnyOf.detectors must not be empty, got 0 detectors. Name at least one.")
        self.detectors = detectors
        names = [detector.card.name for detector in detectors]
        names = [name if names.index(name) == i else f"{name}-{i + 1}" for i, name in enumerate(names)]
        self.names = tuple(names)
        self.card = DetectorCard(
            name=" or ".join(names),
            classes=tuple(f"{name}:{one}" for name, detector in zip(names, detectors) for one in detector.card.classes),
            threshold=0.5,
            weights_sha256=hash_value([detector.card.weights_sha256 for detector in detectors]),
            covers={f"{name}:{one}": ids for name, part in zip(names, detectors) for one, ids in part.card.coverage.items()},
            domain=_common_domain(detectors),
            abstains=any(detector.card.abstains for detector in detectors),
        )

    def keep_answers(self, folder: Path) -> None:
        """See `KeepsAnswers`; each detector that does so has a folder of its own."""
        for name, detector in zip(self.names, self.detectors):
            if isinstance(detector, KeepsAnswers):
                detector.keep_answers(folder / name)

    def remarks(self) -> list[str]:
        """Those of its detectors."""
        return [one for detector in self.detectors if isinstance(detector, KeepsAnswers) for one in detector.remarks()]

    def detect(self, images: Sequence[Image]) -> Float[np.ndarray, "image class"]:
        """``[image, class]`` scores in [0, 1], the detectors' columns side by side."""
        return np.concatenate([to_half(scores_of(one, images), one.card.threshold) for one in self.detectors], axis=1)
