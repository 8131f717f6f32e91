"""Any local `transformers` image classifier as a detector: a map says which of its classes are which category of harm.

A category's score is the probability of all its classes together, so "at least medium" of a graded model is ``medium``
and ``high``; of a model whose classes do not exclude one another it is the highest.
The order of classes is read from ``id2label``: of published models some have the harmful class first, others last.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL.Image import Image

from valign.checks import UserError, check_range, close_to, first_line
from valign.detectors.any_of import to_half
from valign.detectors.base import check_pin, hash_weights
from valign.detectors.record import read_record
from valign.files import read_json
from valign.images import as_shown
from valign.interfaces import DetectorCard
from valign.methods import Method
from valign.models.devices import LOAD_ERRORS, choose_device
from valign.models.files.finite import check_finite

METHOD = Method(
    slug="image-classifier",
    title="Any transformers image classifier as a detector, by a map of its classes",
    paper="-",
    room="detectors",
    entry="valign.detectors.image_classifier:ImageClassifierDetector",
    fidelity="exact",
    note="the model's own probabilities, summed over the classes of a category",
)


def class_labels(folder: Path) -> list[str]:
    """Names of a classifier's outputs, in their order. Raises: UserError if the folder does not hold one in safetensors."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} must be the folder of a transformers image classifier, it has no config.json.")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder} must hold safetensors weights, found none; pickles are not opened. Convert the model first.")
    labels = read_json(path).get("id2label")
    if not isinstance(labels, dict) or not labels or not all(str(key).isdigit() for key in labels):
        raise UserError(f"{path} must name the model's classes as id2label, got {labels!r}. Choose an image classifier.")
    return [str(labels[key]) for key in sorted(labels, key=int)]


def check_map(classes: Mapping[str, str], labels: Sequence[str], known: Sequence[str]) -> None:
    """Raise UserError unless ``classes`` maps classes of the model to categories of the policy, at least one."""
    if not classes:
        raise UserError(
            f"--map must name the category of at least one class, got none. The model's classes: {', '.join(labels)}; the policy's "
            f"categories: {', '.join(known)}. For example --map {labels[-1]}={known[0]}"
        )
    if unknown := [name for name in classes if name not in labels]:
        raise UserError(f"--map must name classes of the model ({', '.join(labels)}), got {unknown[0]!r}.")
    if set(classes) == set(labels) and len(labels) > 1:
        raise UserError(f"--map must leave out the harmless classes, got all of {', '.join(labels)}: every image would be harmful.")
    if unknown := [name for name in classes.values() if name not in known]:
        raise UserError(f"--map must name categories of the policy ({', '.join(known)}), got {unknown[0]!r}.")


def check_thresholds(thresholds: Mapping[str, float], categories: Sequence[str]) -> None:
    """Raise UserError unless each category has a threshold in (0, 1] and no other name has one."""
    for name, value in thresholds.items():
        if name not in categories:
            raise UserError(
                f"--threshold must name a mapped category ({', '.join(categories)}), got {name!r}.{close_to(name, categories)}"
            )
        try:
            check_range(f"--threshold {name}".strip(), value, above=0.0, high=1.0, hint="At 0 every image would be harmful.")
        except ValueError as error:
            raise UserError(str(error)) from error


class ImageClassifierDetector:
    """A classifier folder behind a `detector.json`, whose options are ``model`` (a folder), ``classes`` and ``thresholds``.

    With one threshold for all categories scores are the model's own probabilities; with several they are bent to 0.5 (`to_half`).
    """

    card: DetectorCard

    def __init__(self, folder: str | Path, *, device: str = "auto", batch_size: int = 32, sha256: str | None = None) -> None:
        """Open the detector's folder. Raises: UserError if it, or the model that it names, is missing, broken or changed."""
        folder = Path(folder)
        options = read_record(folder).options
        self._open(folder / str(options["model"]), options["classes"], options["thresholds"], device, batch_size)
        check_pin("image-classifier", self.card.weights_sha256, sha256)
        self.card = read_record(folder).card_for(folder, self.card.weights_sha256)

    @classmethod
    def of_model(cls, model: Path, classes: Mapping[str, str], thresholds: Mapping[str, float]) -> "ImageClassifierDetector":
        """Straight from a model's folder, with a card whose error is unknown."""
        new = cls.__new__(cls)
        new._open(model, classes, thresholds, "auto", 32)
        return new

    def _open(self, model: Path, classes: Mapping[str, str], thresholds: Mapping[str, float], device: str, batch_size: int) -> None:
        labels = class_labels(model)
        self.device, self.batch_size = choose_device(device), batch_size
        self.processor, self.model = _load(model, self.device)
        self.several = self.model.config.problem_type == "multi_label_classification" or len(labels) == 1
        self.columns = {name: [labels.index(one) for one in classes if classes[one] == name] for name in classes.values()}
        limits = [thresholds[name] for name in self.columns]
        self.bend = np.array(limits) if len(set(limits)) > 1 else None
        threshold = 0.5 if self.bend is not None else limits[0]
        weights = hash_weights(model)
        self.card = DetectorCard(model.resolve().name, tuple(self.columns), threshold, weights)

    @torch.no_grad()
    def detect(self, images: Sequence[Image]) -> Float[np.ndarray, "image class"]:
        """``[image, category]`` scores in [0, 1]."""
        parts = [self._probabilities(images[at : at + self.batch_size]) for at in range(0, len(images), self.batch_size)]
        if not parts:
            return np.zeros((0, len(self.columns)))
        shares, together = np.concatenate(parts), np.max if self.several else np.sum
        scores = np.stack([together(shares[:, own], axis=1) for own in self.columns.values()], axis=1).clip(0, 1)
        return scores if self.bend is None else to_half(scores, self.bend)

    def _probabilities(self, images: Sequence[Image]) -> Float[np.ndarray, "image label"]:
        pixels = self.processor(images=[as_shown(image) for image in images], return_tensors="pt")
        logits = self.model(**pixels.to(self.device)).logits.double()
        return (logits.sigmoid() if self.several else logits.softmax(-1)).cpu().numpy()


def _load(folder: Path, device: torch.device) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        model = AutoModelForImageClassification.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32
        )
    except LOAD_ERRORS as error:
        raise UserError(
            f"{folder} could not be opened as an image classifier: {first_line(error)}. Save the model again."
        ) from error
    check_finite(folder, model.state_dict())
    return processor, model.eval().to(device)
