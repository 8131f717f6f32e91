"""The image filter that ships with Stable Diffusion, as a detector: it reports, and the image stays as it is.

CLIP features of the image against 17 concept vectors (their names were never published; they target sexual
content) and 3 special-care vectors; see ``diffusers.pipelines.stable_diffusion.safety_checker``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL.Image import Image

from valign.checks import UserError
from valign.detectors.base import check_pin, hash_weights
from valign.interfaces import DetectorCard
from valign.methods import Method
from valign.models.encoders.clip import CLIP_MEAN, CLIP_STD
from valign.models.files.finite import check_finite
from valign.models.images import pil_to_tensor

METHOD = Method(
    slug="safety-checker",
    title="Stable Diffusion safety checker",
    paper="arXiv 2210.04610",
    room="detectors",
    entry="valign.detectors.safety_checker:SafetyCheckerDetector",
    fidelity="exact",
    note="the released filter's concept and special-care rule; a flagged image is reported and not blackened",
)


def safety_margins(
    concept_cos: Float[np.ndarray, "image concept"],
    concept_thresholds: Float[np.ndarray, " concept"],
    special_cos: Float[np.ndarray, "image special"],
    special_thresholds: Float[np.ndarray, " special"],
) -> Float[np.ndarray, "image concept"]:
    """``round(cos - threshold + a, 3)`` per concept, ``a = 0.01`` once any special-care margin is above 0. Flagged when above 0."""
    special = np.round(special_cos - special_thresholds, 3)
    adjustment = np.where((special > 0).any(axis=1, keepdims=True), 0.01, 0.0).astype(concept_cos.dtype)
    return np.round(concept_cos - concept_thresholds + adjustment, 3)


class SafetyCheckerDetector:
    """Scores are ``0.5 + margin``, cut to [0, 1]: margins come in steps of 0.001, so ``>= 0.5005`` says "above 0" exactly."""

    def __init__(self, folder: str | Path, *, batch_size: int = 32, sha256: str | None = None) -> None:
        """Open a pipeline folder with a ``safety_checker`` in it, or that sub-folder itself; safetensors only."""
        folder = Path(folder)
        folder = folder / "safety_checker" if (folder / "safety_checker").is_dir() else folder
        self.model = _load(folder)
        check_finite(folder, self.model.state_dict())
        weights = hash_weights(folder)
        check_pin("safety-checker", weights, sha256)
        classes = tuple(f"concept-{index}" for index in range(len(self.model.concept_embeds)))
        self.card = DetectorCard("safety-checker", classes, 0.5005, weights, covers=dict.fromkeys(classes, "sexual"))
        self.batch_size = batch_size

    def detect(self, images: Sequence[Image]) -> Float[np.ndarray, "image class"]:
        """``[image, 17]`` scores in [0, 1]; the images are left alone."""
        rows = [self._margins(images[start : start + self.batch_size]) for start in range(0, len(images), self.batch_size)]
        margins = np.concatenate(rows) if rows else np.zeros((0, len(self.card.classes)))
        return np.clip(0.5 + margins.astype(np.float64), 0, 1)

    @torch.no_grad()
    def _margins(self, images: Sequence[Image]) -> Float[np.ndarray, "image class"]:
        model = self.model
        pixels = clip_pixels(images, model.config.vision_config.image_size)
        features = model.visual_projection(model.vision_model(pixels.to(model.device, model.dtype))[1])
        return safety_margins(
            _cosine(features, model.concept_embeds),
            _numpy(model.concept_embeds_weights),
            _cosine(features, model.special_care_embeds),
            _numpy(model.special_care_embeds_weights),
        )


def _load(folder: Path) -> Any:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} must be a safety checker's folder, it has no config.json. Give a pipeline folder with safety_checker/."
        )
    try:
        return StableDiffusionSafetyChecker.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
    except OSError as error:
        raise UserError(
            f"{folder} could not be opened as a safety checker: {error}. It needs model.safetensors beside config.json."
        ) from error


def clip_pixels(images: Sequence[Image], size: int) -> Float[torch.Tensor, "image 3 size size"]:
    """Shorter side to ``size``, centre square, CLIP's statistics; float32."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return ((pil_to_tensor(images, size) + 1) / 2 - mean) / std


def _cosine(features: torch.Tensor, vectors: torch.Tensor) -> Float[np.ndarray, "image vector"]:
    normal = torch.nn.functional.normalize
    return _numpy(normal(features) @ normal(vectors).T)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
