"""Distance from the root of a hyperbolic CLIP as a detector: an image is unsafe from a distance on (HySAC, arXiv 2503.12127)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL.Image import Image

from valign.detectors.base import check_pin
from valign.detectors.errors import CategoryError, DetectorError
from valign.detectors.record import read_record
from valign.interfaces import DetectorCard
from valign.methods import Method
from valign.models.encoders.hyperbolic_clip import HyperbolicClip, load_hyperbolic

METHOD = Method(
    slug="hysac-detector",
    title="HySAC as a detector: the distance to the root says how unsafe an image or a prompt is",
    paper="arXiv 2503.12127",
    room="detectors",
    entry="valign.detectors.hysac:HysacDetector",
    fidelity="variant",
    note="the paper shows bounds of the groups; limits are set by Youden's index on quadruples that were held out",
)


class HysacDetector:
    """One class, "unsafe", of all categories that it was trained on. `clip` judges prompts in the same way."""

    def __init__(self, folder: str | Path, *, device: str = "auto", sha256: str | None = None) -> None:
        """Open a folder of ``valign train hysac``. Raises: UserError if a file is missing, broken or changed."""
        folder = Path(folder)
        record = read_record(folder)
        self.clip = load_hyperbolic(folder, device=device)
        check_pin("hysac", self.clip.weights_sha256, sha256)
        self.card = record.card_for(folder, self.clip.weights_sha256)

    @classmethod
    def of(cls, clip: HyperbolicClip, card: DetectorCard) -> "HysacDetector":
        """Straight from a model, with a card whose error is unknown."""
        new = cls.__new__(cls)
        new.clip, new.card = clip, card
        return new

    def detect(self, images: Sequence[Image]) -> Float[np.ndarray, "image class"]:
        """``[image, 1]`` probabilities of harm."""
        return self.clip.image_harm(images)[:, None] if images else np.zeros((0, 1))


def prompt_error(clip: HyperbolicClip, prompts: Sequence[tuple[str, tuple[str, ...]]], *, batch_size: int = 64) -> DetectorError:
    """Errors on prompts with the categories of harm that each asks for, over all harm and per category."""
    texts = [text for text, _ in prompts]
    batches = [texts[first : first + batch_size] for first in range(0, len(texts), batch_size)]
    flagged = np.concatenate([clip.text_harm(batch) >= clip.card.text.limit for batch in batches])
    harmful = np.array([bool(own) for _, own in prompts])
    passed, negatives = int((~flagged & ~harmful).sum()), int((~harmful).sum())
    rows = []
    for name in ("", *sorted({one for _, own in prompts for one in own})):
        asked = np.array([name in own if name else bool(own) for _, own in prompts])
        rows.append(
            CategoryError(
                category=name, flagged=int((flagged & asked).sum()), positives=int(asked.sum()), passed=passed, negatives=negatives
            )
        )
    return DetectorError(tuple(rows))
