"""Models that a user has, as detectors' folders: an image classifier with a map of its classes, a vision-language judge."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from valign.checks import UserError
from valign.detectors.fitting import copy_encoder, detector_name
from valign.detectors.image_classifier import ImageClassifierDetector, check_map, check_thresholds, class_labels
from valign.detectors.record import DetectorRecord, write_record
from valign.detectors.vision_judge import JudgeOptions, judge_card, policy_questions
from valign.files import atomic_folder
from valign.policy import Policy, normalize_category
from valign.runs import versions

THRESHOLD = 0.5  # where none is given


def import_classifier(
    model: Path,
    out: Path,
    policy: Policy,
    classes: Mapping[str, str],
    thresholds: Mapping[str, float],
    *,
    copy: bool = False,
) -> DetectorRecord:
    """Write a detector's folder around the classifier in ``model``, which it names, or holds a copy of.

    Args:
        classes: The model's class -> category of the policy; classes that it does not name are harmless.
        thresholds: Category -> score from which an image is harmful, in (0, 1]; "" for all that have none of their own.
    Raises: UserError, with nothing written, for a map or thresholds that do not fit, and for a model that does not load.
    """
    known, labels = policy.category_ids(), class_labels(model)
    spelled = {name: _spelled(category, known) for name, category in classes.items()}
    check_map(spelled, labels, known)
    categories = list(dict.fromkeys(spelled.values()))
    given = {_spelled(name, known) if name else "": value for name, value in thresholds.items()}
    check_thresholds(given, ["", *categories])
    limits = {name: given.get(name, given.get("", THRESHOLD)) for name in categories}
    detector = ImageClassifierDetector.of_model(model, spelled, limits)
    record = DetectorRecord(
        kind="image-classifier",
        card=replace(detector.card, name=detector_name(out)),
        options={"model": "model" if copy else str(model.resolve()), "classes": spelled, "thresholds": limits},
        made={"model": str(model), "policy": policy.id, "labels": labels, "versions": versions()},
    )
    with atomic_folder(out) as folder:
        if copy:
            copy_encoder(model, folder / "model")
        write_record(folder, record)
    return record


def import_judge(out: Path, policy: Policy, categories: Sequence[str], options: JudgeOptions) -> DetectorRecord:
    """Write a judge's folder: its questions from the policy, and how it is asked. Where it is asked is said when it is used."""
    questions = policy_questions(policy, categories)
    record = DetectorRecord(
        kind="vision-judge",
        card=judge_card(detector_name(out), questions, options),
        options={**asdict(options), "questions": questions},
        made={"policy": policy.id, "versions": versions()},
    )
    with atomic_folder(out) as folder:
        write_record(folder, record)
    return record


def _spelled(name: str, known: Sequence[str]) -> str:
    """A category in the policy's spelling; a name that the policy lacks as it is, for `check_map` to refuse."""
    try:
        return normalize_category(name, known)
    except UserError:
        return name
