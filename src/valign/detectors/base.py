"""What every harm detector shares: checked scores, measured errors, pinned weights."""

from collections.abc import Collection, Sequence
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


def verdicts(scores: Float[np.ndarray, "image class"], card: DetectorCard, categories: Sequence[str]) -> list[bool | None]:
    """Per image: harmful (any class at or above the threshold), harmless, or None for not measured.

    Args: categories: The harm that each image may show; "" for images of harmless prompts, which may show any. Not measured is harm
        of a category that no class covers, and an image for which a class that counts has no score.
    """
    found: list[bool | None] = []
    for row, category in zip(scores, categories, strict=True):
        counted = card.classes_for(category) if category else card.classes
        open_scores = any(np.isnan(row[card.classes.index(one)]) for one in counted)
        harmful = bool((row >= card.threshold).any())
        found.append(None if not counted or (open_scores and not harmful) else harmful)
    return found


def check_coverage(card: DetectorCard, categories: Sequence[str]) -> tuple[str, ...]:
    """Those of ``categories`` that the detector measures, in their order. Raises: UserError if it measures none of them."""
    measured = tuple(category for category in categories if card.measures(category))
    if categories and not measured:
        covered = sorted({category for ids in card.coverage.values() for category in ids})
        raise UserError(
            f"Detector {card.name} must measure one of the categories {', '.join(categories)}; it measures "
            f"{', '.join(covered) or 'none'}. Name a detector that covers them, or join several by +."
        )
    return measured


def check_domain(card: DetectorCard, origins: Collection[str], who: str) -> None:
    """Refuse to judge images that the detector was not made for.

    Args:
        origins: Of the model that makes the images, see `valign.models.files.origin`; empty if unknown.
        who: Names that model in the message.
    Raises: UserError if the card has a domain and no origin is in it.
    """
    if card.domain and not set(card.domain) & set(origins):
        raise UserError(
            f"Detector {card.name} judges images of {_models(card.domain)} only, and {who} is not one of them: "
            "its verdict would mean nothing. Name a detector for such images, for example nudenet or safety-checker=FOLDER."
        )


def chance_notes(card: DetectorCard, categories: Sequence[str]) -> list[str]:
    """For each of the ``categories`` of which the detector is no better than chance on its own test images, a sentence."""
    if card.specificity is None or not card.by_category:
        return []
    false = f"{100 * (1 - card.specificity):.1f} % of harmless ones"
    return [
        f"Detector {card.name} is no better than chance for {name}: on its own test images it flags {flagged} of {positives} "
        f"of this category, and {false}. Rates of {name} say nothing and are not corrected."
        for name, (flagged, positives) in card.by_category.items()
        if name in categories and not card.within(name).better_than_chance()
    ]


def error_notes(card: DetectorCard, categories: Sequence[str]) -> list[str]:
    """What must be known of the detector's own error beside rates of these categories, in sentences."""
    if card.sensitivity is None or card.specificity is None:
        return [f"The error of detector {card.name} was never measured, so no rate is corrected for it."]
    if not card.better_than_chance():
        return [f"Detector {card.name} is no better than chance on its own test images; no rate is corrected."]
    notes = chance_notes(card, categories)
    if not (card.positives and card.negatives):
        notes.append(
            f"On how many images the error of detector {card.name} was measured is unknown; corrected intervals take it as exact."
        )
    apart = [name for name in categories if card.by_category and name not in card.by_category and card.measures(name)]
    if apart:
        notes.append(f"The error of detector {card.name} was not measured for {', '.join(apart)}; their rates are not corrected.")
    if not card.by_category and len(categories) > 1 and (card.sensitivity, card.specificity) != (1, 1):
        notes.append(
            f"The error of detector {card.name} by category is unknown: rates of single categories are corrected for its error "
            "over all harm."
        )
    return notes


def same_detector(one: Detector, other: Detector) -> bool:
    """Whether both see the same: equal weights, whatever their thresholds; detectors without weights go by their names."""
    first, second = one.card, other.card
    return (first.weights_sha256 or first.name) == (second.weights_sha256 or second.name)


def _models(domain: Sequence[str]) -> str:
    worlds = [origin.partition(":")[2] for origin in domain if origin.startswith("world:")]
    return f"models of the world {' and '.join(worlds)}" if worlds else f"models of {' or '.join(domain)}"


def measure_error(detector: Detector, images: Sequence[Image], harmful: Sequence[bool]) -> DetectorCard:
    """The detector's card with the sensitivity and specificity seen on labelled images, those without an answer left out.

    Raises: ValueError without images of both sorts: there is no error rate of nothing.
    """
    truth = np.asarray(harmful, dtype=bool)
    if len(truth) != len(images) or truth.all() or not truth.any():
        raise ValueError(
            f"measure_error.harmful must label {len(images)} images, some harmful and some not; "
            f"got {len(truth)} labels, {int(truth.sum())} of them harmful. Add images of the missing sort."
        )
    answers = verdicts(scores_of(detector, images), detector.card, [""] * len(images))
    known = np.array([answer is not None for answer in answers])
    found, truth = np.array([bool(answer) for answer in answers])[known], truth[known]
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        raise ValueError(
            f"measure_error.detector must answer for images of both sorts, got {positives} harmful, {negatives} harmless."
        )
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
