"""A probe fitted to a user's labelled images, calibrated and tested on others of them, in a detector's folder (Q16's kind)."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.special import expit
from torch import Tensor

from valign.checks import UserError, check_options, option
from valign.data.images.labelled import HarmExample, LabelledImages, split_labelled
from valign.detectors.calibration import best_threshold, platt
from valign.detectors.clip_probe import ClipProbeDetector, ImageEncoder, fit_probe, probe_logit, save_probe
from valign.detectors.errors import DetectorError, measure_detector
from valign.detectors.record import DetectorRecord, write_record
from valign.files import atomic_folder
from valign.progress import track
from valign.runs import versions

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a probe is fitted."""

    steps: int = option(300, help="optimizer steps", low=1)
    learning_rate: float = option(0.01, help="learning rate", above=0)
    seed: int = option(0, help="of the split and the start", low=0, high=2**31 - 1)

    def __post_init__(self) -> None:
        check_options(self)


def fit_detector(
    labelled: LabelledImages,
    encoder: ImageEncoder,
    out: Path,
    *,
    place: Path,
    copy: bool = False,
    domain: Sequence[str] = (),
    origin: str = "",
    options: FitOptions | None = None,
) -> DetectorError:
    """Fit a class per category to half of the images, calibrate on a quarter, test on the rest, write ``out``; return the error.

    Args:
        place: The encoder's folder, which the detector's folder names, or holds a copy of.
        domain: Whose images it can judge, as in `DetectorCard`.
        origin: Of the images, for the record.
    Raises: UserError, with nothing written, if ``out`` exists, a category has too few images, or one is not learned.
    """
    options = options or FitOptions()
    if out.exists():
        raise UserError(f"{out} exists. Choose another output folder, or delete it first.")
    classes = labelled.categories()
    parts = split_labelled(labelled, seed=options.seed)
    fitting, held_out = (_features(encoder, part) for part in parts[:2])
    vectors = fit_probe(fitting, _labels(parts[0], classes), steps=options.steps, lr=options.learning_rate, seed=options.seed)
    with atomic_folder(out) as folder:
        if copy:
            copy_encoder(place, folder / "encoder")
        logits = probe_logit(held_out, vectors).double().numpy()
        truth = _labels(parts[1], classes).numpy()
        calibration = torch.tensor([platt(logits[:, i], truth[:, i], who=f"Category {name}") for i, name in enumerate(classes)])
        save_probe(folder / "probe.safetensors", vectors, classes, encoder.weights_sha256, calibration=calibration)
        slope, offset = calibration.double().numpy().T
        limit = best_threshold(expit(slope * logits + offset).max(axis=1), np.asarray(truth.any(axis=1), dtype=bool))
        detector = ClipProbeDetector(folder, encoder=encoder, threshold=limit)
        detector.card = replace(detector.card, name=detector_name(out), domain=tuple(domain))
        error = measure_detector(detector, parts[2])
        record = DetectorRecord(
            kind="clip-probe",
            card=error.on(detector.card),
            options={"encoder": "encoder" if copy else str(place.resolve())},
            measured=error.record(images=f"held out of {origin or 'the labelled images'}", sha256=labelled.fingerprint()),
            made={
                "images": origin,
                "images_sha256": labelled.fingerprint(),
                "repeated": labelled.repeated,
                "fitted": len(parts[0]),
                "calibrated": len(parts[1]),
                "tested": len(parts[2]),
                **asdict(options),
                "versions": versions(),
            },
        )
        write_record(folder, record)
    return error


def detector_name(folder: Path) -> str:
    """A detector's name, from its folder's."""
    return re.sub(r"[^\w.-]+", "-", folder.resolve().name)


def copy_encoder(place: Path, folder: Path) -> None:
    """Copy a transformers model's files; nothing else that lies beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(path for path in place.iterdir() if path.suffix in (".json", ".safetensors", ".txt")):
        shutil.copyfile(file, folder / file.name)


def _features(encoder: ImageEncoder, examples: Sequence[HarmExample]) -> Float[Tensor, "image dim"]:
    batches = [examples[at : at + BATCH] for at in range(0, len(examples), BATCH)]
    rows = [encoder.image_features([one.open() for one in batch]) for batch in track(batches, "Encoding images")]
    return torch.from_numpy(np.concatenate(rows).astype(np.float32))


def _labels(examples: Sequence[HarmExample], classes: Sequence[str]) -> Bool[Tensor, "image class"]:
    return torch.tensor([[name in one.categories for name in classes] for one in examples], dtype=torch.bool)
