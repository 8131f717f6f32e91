"""Two tuned vectors per class in CLIP's space say whether an image shows the class (Q16, arXiv 2202.06675).

``p = softmax(100 [cos(image, harmless), cos(image, harmful)])``, harmful from 0.5 on: every image that the
softmax favours counts. (The published tool lists only those at 0.9 or above unless told otherwise.)
A probe file is safetensors: ``vectors`` [class, 2, dim], with the class names, what they cover and the encoder's
hash in its header; a fitted one also has ``calibration`` [class, 2], slope and offset of each class's logit (Platt 1999).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from valign.checks import UserError, check_range
from valign.detectors.base import check_pin
from valign.detectors.record import FILE, read_record
from valign.files import atomic_path, hash_file, hash_value
from valign.interfaces import DetectorCard
from valign.methods import Method
from valign.models.files.finite import check_finite

METHOD = Method(
    slug="clip-probe",
    title="Q16: prompt-tuned CLIP probe of inappropriate images",
    paper="arXiv 2202.06675",
    room="detectors",
    entry="valign.detectors.clip_probe:ClipProbeDetector",
    fidelity="exact",
    note="the released form, two tuned vectors per class and CLIP's logit scale; fitted anew for each set of classes",
)
SHARPNESS = 100.0  # CLIP's own logit scale


@runtime_checkable
class ImageEncoder(Protocol):
    """Anything that turns images into vectors: `valign.models.encoders.clip.ClipEncoder`, or a world's encoder."""

    @property
    def weights_sha256(self) -> str: ...
    def image_features(self, images: Sequence[Image]) -> Float[np.ndarray, "image dim"]: ...


def probe_logit(features: Float[Tensor, "image dim"], vectors: Float[Tensor, "class 2 dim"]) -> Float[Tensor, "image class"]:
    """``100 (cos(image, harmful) - cos(image, harmless))``; its sigmoid is the softmax's harmful side. Lengths do not matter."""
    normal = torch.nn.functional.normalize
    cosines = torch.einsum("id,csd->ics", normal(features, dim=-1), normal(vectors, dim=-1))
    return SHARPNESS * (cosines[..., 1] - cosines[..., 0])


def fit_probe(
    features: Float[Tensor, "image dim"],
    labels: Bool[Tensor, "image class"],
    *,
    steps: int = 300,
    lr: float = 0.01,
    seed: int = 0,
) -> Float[Tensor, "class 2 dim"]:
    """Tune the pairs on labelled features by full-batch Adam on the cross-entropy; start: the class means plus seeded noise."""
    check_range("fit_probe.steps", float(steps), low=1.0)
    check_range("fit_probe.lr", lr, above=0.0)
    counts = labels.sum(0)
    if not ((counts > 0) & (counts < len(labels))).all():
        raise ValueError(
            f"fit_probe.labels must hold both sorts for every class, got {counts.tolist()} of {len(labels)}. Add images."
        )
    directions = torch.nn.functional.normalize(features.float(), dim=-1)
    start = torch.stack([torch.stack([directions[~column].mean(0), directions[column].mean(0)]) for column in labels.T])
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
    vectors = (start + 0.01 * noise / start.shape[-1] ** 0.5).requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=lr)
    weight = torch.where(labels, 0.5 / counts, 0.5 / (len(labels) - counts))  # both sorts weigh the same
    for _ in range(steps):
        logit = probe_logit(directions, vectors)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, labels.float(), weight=weight, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vectors.detach()


def save_probe(
    path: Path,
    vectors: Float[Tensor, "class 2 dim"],
    classes: Sequence[str],
    encoder: str,
    *,
    covers: Mapping[str, str | Sequence[str]] | str | None = None,
    calibration: Float[Tensor, "class 2"] | None = None,
) -> None:
    """Write a probe file atomically.

    Args:
        encoder: The ``weights_sha256`` of the encoder whose features it was tuned on.
        covers: The categories of harm that each class measures, as in `DetectorCard`; None: the one of the class's own name.
        calibration: Slope (above 0) and offset of each class's logit; None leaves the logits as they are.
    """
    if len(classes) != len(vectors):
        raise ValueError(
            f"save_probe.classes must name {len(vectors)} classes, got {len(classes)}. Give one name per pair of vectors."
        )
    header = {"classes": "\n".join(classes), "encoder": encoder}
    if covers is not None:
        header["covers"] = json.dumps(covers)
    tensors = {"vectors": vectors.contiguous()}
    if calibration is not None:
        tensors["calibration"] = calibration.contiguous()
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"probe": json.dumps(header)})  # one entry: safetensors orders several at random


class ClipProbeDetector:
    """A probe together with the encoder that it was tuned for; another encoder, or another hash than pinned, is refused."""

    def __init__(
        self, folder: str | Path, *, encoder: ImageEncoder | None = None, threshold: float = 0.5, sha256: str | None = None
    ) -> None:
        """Open ``folder/probe.safetensors`` with ``encoder``, or else with the CLIP model that `detector.json` names, or that lies
        in the same folder."""
        folder = Path(folder)
        probe = folder / "probe.safetensors"
        record = read_record(folder) if (folder / FILE).is_file() else None
        self.vectors, self.calibration, classes, tuned_on, covers = _open(probe)
        self.encoder = encoder or _clip(folder, record.options if record else {})
        found, weights = self.encoder.weights_sha256, hash_file(probe)
        dim = getattr(self.encoder, "dim", self.vectors.shape[-1])
        if dim != self.vectors.shape[-1]:
            raise UserError(
                f"{probe} must be made for embeddings of {dim} numbers, which the encoder gives, got one for "
                f"{self.vectors.shape[-1]}. Use the encoder that it was tuned on, or fit the probe again."
            )
        if tuned_on != found:
            raise UserError(
                f"{probe} was tuned on encoder {tuned_on[:12]}, got encoder {found[:12]}. Use that encoder, or fit the probe again."
            )
        check_pin("clip-probe", weights, sha256)
        both = hash_value([weights, found])
        self.card = record.card_for(folder, both) if record else DetectorCard("clip-probe", classes, threshold, both, covers=covers)

    def logits(self, images: Sequence[Image]) -> Float[Tensor, "image class"]:
        """Logits before calibration."""
        return probe_logit(torch.from_numpy(np.asarray(self.encoder.image_features(images), dtype=np.float32)), self.vectors)

    def detect(self, images: Sequence[Image]) -> Float[np.ndarray, "image class"]:
        """``[image, class]`` probabilities of harm."""
        slope, offset = self.calibration.double().T
        return (slope * self.logits(images).double() + offset).sigmoid().numpy()


def _clip(folder: Path, options: Mapping[str, Any]) -> ImageEncoder:
    """Of the options of `detector.json`: the encoder's place, and the adapters in the detector's folder, if it was adapted."""
    from valign.models.encoders.clip import ClipEncoder

    return ClipEncoder(folder / str(options.get("encoder", ".")), adapters=[folder / name for name in options.get("adapters", ())])


def _open(path: Path) -> tuple[Tensor, Tensor, tuple[str, ...], str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            header |= json.loads(header.get("probe", "{}"))
            vectors = file.get_tensor("vectors").float()
            plain = torch.tensor([1.0, 0.0]).expand(len(vectors), 2)
            calibration = file.get_tensor("calibration").float() if "calibration" in set(file.keys()) else plain
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} must be a probe file (safetensors with `vectors`), it could not be read: {error}. Make one with save_probe."
        ) from error
    classes = tuple(header.get("classes", "").split("\n"))
    if vectors.ndim != 3 or vectors.shape[:2] != (len(classes), 2) or "encoder" not in header:
        raise UserError(
            f"{path} must hold vectors [class, 2, dim], class names and encoder, got {tuple(vectors.shape)}. Use save_probe."
        )
    check_finite(path, {"vectors": vectors, "calibration": calibration})
    if calibration.shape != (len(classes), 2) or not (calibration[:, 0] > 0).all():
        raise UserError(
            f"{path} must hold a slope above 0 and an offset per class, got {calibration.tolist()}. Fit the probe again."
        )
    try:
        covers = json.loads(header.get("covers", "null"))
    except ValueError as error:
        raise UserError(f"{path} must say what its classes cover as JSON, got {header['covers']!r}. Use save_probe.") from error
    return vectors, calibration, classes, header["encoder"], covers
