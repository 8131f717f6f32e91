"""From the images on disk to rows: the detector, the fidelity reader, CLIP and the features, a batch of images at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL.Image import Image

from valign.detectors.base import Detector, flagged, scores_of
from valign.evaluation.images.clip_score import ImageTextEncoder, clip_scores
from valign.evaluation.images.drift import cosine_drift, pixel_rmse
from valign.evaluation.images.fidelity import Fidelity, read_fidelity
from valign.evaluation.images.folder import ImageFolder
from valign.evaluation.results import Row, prompt_columns
from valign.evaluation.suite import EvalPrompt, Suite
from valign.progress import track

Features = Callable[[Sequence[Image]], Any]  # images -> [image, dim]


@dataclass(frozen=True)
class Instruments:
    """Everything that looks at an image; only the detector is a must."""

    detector: Detector
    fidelity: Fidelity | None = None
    clip: ImageTextEncoder | None = None
    features: Features | None = None
    features_name: str = ""


@dataclass(frozen=True)
class Measured:
    """One system's rows in the suite's order, its images, and features by prompt id: for the base all, else benign prompts."""

    rows: list[Row]
    images: ImageFolder
    features: dict[str, Float[np.ndarray, " dim"]] = field(default_factory=dict)


def measure(
    name: str,
    images: ImageFolder,
    base: Measured | None,
    suite: Suite,
    seeds: Sequence[int],
    instruments: Instruments,
    *,
    batch_size: int = 64,
) -> Measured:
    """Look at every image of a system, beside the base's of the same prompt and seed. ``base`` is None for the base itself."""
    rows: list[Row] = []
    kept: dict[str, np.ndarray] = {}
    items = list(zip(suite.prompts, seeds))
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    for batch in track(batches, f"Measuring {name}"):
        answered = [(prompt, seed, image) for prompt, seed in batch if (image := images.open(prompt.id)) is not None]
        columns, features = _look(answered, base, instruments)
        kept |= {prompt.id: row for (prompt, _, _), row in zip(answered, features) if prompt.benign or base is None}
        known = {prompt.id: values for (prompt, _, _), values in zip(answered, columns)}
        for prompt, seed in batch:
            rows.append(Row(system=name, **prompt_columns(prompt, seed), **known.get(prompt.id, {"blocked": True})))
    return Measured(rows, images, kept)


def _look(
    answered: Sequence[tuple[EvalPrompt, int, Image]], base: Measured | None, instruments: Instruments
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """What each instrument says of each image, and the feature rows (none without a feature reader)."""
    if not answered:
        return [], []
    images = [image for _, _, image in answered]
    card = instruments.detector.card
    scores = scores_of(instruments.detector, images)
    columns: list[dict[str, Any]] = [
        {"harmful": bool(harmful), "scores": dict(zip(card.classes, map(float, row)))}
        for harmful, row in zip(flagged(scores, card), scores)
    ]
    if instruments.fidelity is not None:
        found = read_fidelity(instruments.fidelity, images, [prompt.expected for prompt, _, _ in answered])
        _add(columns, "fidelity", found)
    if instruments.clip is not None:
        _add(columns, "clip", clip_scores(instruments.clip, images, [prompt.prompt for prompt, _, _ in answered]).tolist())
    features = np.zeros((0, 0)) if instruments.features is None else _rows(instruments.features(images))
    if base is not None:
        pairs = [(i, twin) for i, (prompt, _, _) in enumerate(answered) if (twin := base.images.open(prompt.id)) is not None]
        paired = [columns[i] for i, _ in pairs]
        _add(paired, "rmse", pixel_rmse([twin for _, twin in pairs], [images[i] for i, _ in pairs]).tolist())
        if len(features) and pairs:
            twins = np.stack([base.features[answered[i][0].id] for i, _ in pairs])
            _add(paired, "drift", cosine_drift(twins, features[[i for i, _ in pairs]]).tolist())
    return columns, list(features)


def _add(columns: Sequence[dict[str, Any]], name: str, values: Sequence[Any]) -> None:
    for column, value in zip(columns, values):
        column[name] = value


def _rows(features: Any) -> Float[np.ndarray, "image dim"]:
    return np.asarray(features, dtype=np.float32).reshape(len(features), -1)
