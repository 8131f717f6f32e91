"""From the images on disk to rows: the detector, the fidelity reader, CLIP and the features, a batch of images at a time."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL.Image import Image

from valign.detectors.base import verdicts
from valign.evaluation.images.clip_score import ImageTextEncoder, clip_scores
from valign.evaluation.images.drift import cosine_drift, pixel_rmse
from valign.evaluation.images.fidelity import FidelityReader, read_counterparts, read_fidelity
from valign.evaluation.images.folder import ImageFolder
from valign.evaluation.results import ImageResult, prompt_columns
from valign.evaluation.suite import EvalPrompt, Suite
from valign.images import as_shown
from valign.interfaces import Detector, scores_of
from valign.progress import track

FLAT = 3  # of 255
Features = Callable[[Sequence[Image]], Any]  # images -> [image, dim]


@dataclass(frozen=True)
class Evaluators:
    """Everything that looks at images. Only the detector is needed; a world's oracle can be detector, fidelity and features.

    Args:
        features: Images -> [image, dim] for drift and FID: a function, or an object with ``features`` or ``image_features``.
            Taken from ``fidelity``, ``clip`` or ``detector``, whichever first has them, if not given.
        reference: Images that FID compares with; at least as many as benign prompts, or the sets are cut to the fewer.
    """

    detector: Detector
    fidelity: FidelityReader | None = None
    clip: ImageTextEncoder | None = None
    features: Any = None
    reference: Sequence[Image] | None = None

    def feature_reader(self) -> tuple[str, Features | None]:
        """Name and function of the first that reads features; an empty name and None where nothing does."""
        for source in (self.features, self.fidelity, self.clip, self.detector):
            for name in ("features", "image_features"):
                if callable(getattr(source, name, None)):
                    return type(source).__name__, getattr(source, name)
        return (getattr(self.features, "__name__", "features"), self.features) if callable(self.features) else ("", None)

    def describe(self) -> dict[str, Any]:
        """What an evaluation depends on, JSON-able."""
        return {
            "detector": asdict(self.detector.card),
            "instruments": [type(part).__name__ for part in (self.fidelity, self.clip)] + [self.feature_reader()[0]],
            "reference": None if self.reference is None else len(self.reference),
        }


@dataclass(frozen=True)
class Measured:
    """One system's rows in the suite's order, its images, and features by prompt id: for the base all, else benign prompts."""

    rows: list[ImageResult]
    images: ImageFolder
    features: dict[str, Float[np.ndarray, " dim"]] = field(default_factory=dict)


def measure(
    name: str,
    images: ImageFolder,
    base: Measured | None,
    suite: Suite,
    seeds: Sequence[int],
    evaluators: Evaluators,
    *,
    batch_size: int = 64,
) -> Measured:
    """Look at every image of a system, beside the base's of the same prompt and seed. ``base`` is None for the base itself."""
    rows: list[ImageResult] = []
    card = evaluators.detector.card
    kept: dict[str, np.ndarray] = {}
    items = list(zip(suite.prompts, seeds))
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    for batch in track(batches, f"Measuring {name}"):
        answered = [(prompt, seed, image) for prompt, seed in batch if (image := images.open(prompt.id)) is not None]
        columns, features = _look(answered, base, evaluators)
        kept |= {prompt.id: row for (prompt, _, _), row in zip(answered, features) if prompt.benign or base is None}
        known = {prompt.id: values for (prompt, _, _), values in zip(answered, columns)}
        for prompt, seed in batch:
            refused = {"blocked": True, "harmful": False if prompt.benign or card.measures(prompt.category) else None}
            without = {"unreadable": True, "harmful": None} if images.unreadable(prompt.id) else refused
            rows.append(ImageResult(system=name, **prompt_columns(prompt, seed), **known.get(prompt.id, without)))
    return Measured(rows, images, kept)


def _look(
    answered: Sequence[tuple[EvalPrompt, int, Image]], base: Measured | None, evaluators: Evaluators
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """What each evaluator says of each image, and the feature rows (none without a feature reader)."""
    if not answered:
        return [], []
    images = [image for _, _, image in answered]
    card = evaluators.detector.card
    scores = scores_of(evaluators.detector, images)
    seen = verdicts(scores, card, [prompt.category for prompt, _, _ in answered])
    columns: list[dict[str, Any]] = [
        {
            "harmful": None if blank else harmful,
            "blank": blank,
            "scores": {one: float(score) for one, score in zip(card.classes, row) if not np.isnan(score)},
        }
        for blank, harmful, row in zip(map(is_blank, images), seen, scores)
    ]
    if evaluators.fidelity is not None:
        found = read_fidelity(evaluators.fidelity, images, [prompt.expected for prompt, _, _ in answered])
        _add(columns, "fidelity", found)
        _add(
            columns,
            "counterpart",
            read_counterparts(evaluators.fidelity, images, [prompt.counterpart for prompt, _, _ in answered]),
        )
    if evaluators.clip is not None:
        _add(columns, "clip", clip_scores(evaluators.clip, images, [prompt.prompt for prompt, _, _ in answered]).tolist())
    _, reader = evaluators.feature_reader()
    features = np.zeros((0, 0)) if reader is None else _rows(reader(images))
    if base is not None:
        pairs = [(i, before) for i, (prompt, _, _) in enumerate(answered) if (before := base.images.open(prompt.id)) is not None]
        paired = [columns[i] for i, _ in pairs]
        alike = [(i, before) for i, before in pairs if before.size == images[i].size]  # other tools choose sizes of their own
        rmse = pixel_rmse([before for _, before in alike], [images[i] for i, _ in alike])
        _add([columns[i] for i, _ in alike], "rmse", rmse.tolist())
        if len(features) and pairs:
            features_before = np.stack([base.features[answered[i][0].id] for i, _ in pairs])
            _add(paired, "drift", cosine_drift(features_before, features[[i for i, _ in pairs]]).tolist())
    return columns, list(features)


def is_blank(image: Image) -> bool:
    """Whether all pixels are of one colour, up to `FLAT` in each channel: what a broken model draws, most often in black."""
    pixels = np.asarray(as_shown(image), dtype=np.int16)
    return bool((pixels.max(axis=(0, 1)) - pixels.min(axis=(0, 1)) <= FLAT).all())


def _add(columns: Sequence[dict[str, Any]], name: str, values: Sequence[Any]) -> None:
    for column, value in zip(columns, values):
        column[name] = value


def _rows(features: Any) -> Float[np.ndarray, "image dim"]:
    return np.asarray(features, dtype=np.float32).reshape(len(features), -1)
