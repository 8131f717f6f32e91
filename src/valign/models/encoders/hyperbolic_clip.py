"""A CLIP with an adapter whose features are points of hyperbolic space: the further from the root, the less safe (HySAC).

Its folder holds ``adapter/`` (a peft LoRA), ``space.safetensors`` (four scalars, and unsafe captions as points) and ``hysac.json``:
the encoder, bounds of the groups, how distances become probabilities, and what was measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from valign.checks import UserError
from valign.files import atomic_path, hash_value, read_json, write_json
from valign.models.encoders.clip import ClipEncoder
from valign.models.files.finite import check_finite
from valign.models.hyperbolic.lorentz import check_points, distance_table, root_distance
from valign.models.hyperbolic.space import HyperbolicSpace, Modality
from valign.models.hyperbolic.traversal import GroupBounds

CARD, TENSORS, ADAPTER = "hysac.json", "space.safetensors", "adapter"
FORMAT = 1
SAME_CURVATURE = 1e-5  # relative


@dataclass(frozen=True)
class DistanceLimit:
    """Of one modality: ``sigmoid(slope d + offset)`` is the probability of harm at distance d; from ``limit`` on it is harm."""

    slope: float  # above 0
    offset: float
    limit: float  # in (0, 1]

    def probability(self, distances: Float[np.ndarray, " item"]) -> Float[np.ndarray, " item"]:
        return 1 / (1 + np.exp(-(self.slope * np.asarray(distances, dtype=np.float64) + self.offset)))


@dataclass(frozen=True)
class UnsafeCaptions:
    """Captions whose harm is known, as points: the nearest one names the category of an unsafe prompt."""

    points: Float[Tensor, "caption dim"]
    categories: tuple[str, ...]  # of each caption


@dataclass(frozen=True, kw_only=True)
class HyperbolicCard:
    """What `hysac.json` says. ``image`` is None where captions alone were learnt from."""

    bounds: GroupBounds
    text: DistanceLimit
    image: DistanceLimit | None
    notes: Mapping[str, Any] = field(default_factory=dict)  # data, options, measured figures


class HyperbolicClip:
    """Encoder, space, card and captions together.

    Raises: UserError if the bounds were measured at another curvature than the space has, or the captions are of another width.
    """

    def __init__(self, encoder: ClipEncoder, space: HyperbolicSpace, card: HyperbolicCard, captions: UnsafeCaptions) -> None:
        self.encoder, self.space, self.card, self.captions = encoder, space.to(encoder.device), card, captions
        self.curvature = float(space.curvature.detach())
        if abs(card.bounds.curvature - self.curvature) > SAME_CURVATURE * self.curvature:
            raise UserError(
                f"HyperbolicClip.card must have been measured at the curvature of the space, {self.curvature:g}, got "
                f"{card.bounds.curvature:g}: points of two curvatures do not compare. Fit it again."
            )
        if captions.points.shape[1:] != (encoder.dim,) or len(captions.points) != len(captions.categories):
            raise UserError(
                f"HyperbolicClip.captions must be points of {encoder.dim} numbers with a category each, got "
                f"{tuple(captions.points.shape)} and {len(captions.categories)} categories. Fit it again."
            )
        scalars = {name: tensor.tolist() for name, tensor in space.tensors().items()}
        limits = [asdict(limit) if limit else None for limit in (card.text, card.image)]
        self.weights_sha256 = hash_value([encoder.weights_sha256, scalars, *limits])

    def text_points(self, prompts: Sequence[str]) -> Float[Tensor, "prompt dim"]:
        """Prompts as points, float32."""
        return self._points(self.encoder.text_projections(prompts), "text")

    def image_points(self, images: Sequence[Image]) -> Float[Tensor, "image dim"]:
        """Images as points, float32."""
        return self._points(self.encoder.image_projections(images), "image")

    def text_harm(self, prompts: Sequence[str]) -> Float[np.ndarray, " prompt"]:
        """Probability of harm of each prompt."""
        return self.card.text.probability(self.root_distances(self.text_points(prompts)))

    def image_harm(self, images: Sequence[Image]) -> Float[np.ndarray, " image"]:
        """Probability of harm of each image. Raises: UserError where captions alone were learnt from."""
        if self.card.image is None:
            raise UserError(
                f"{self.encoder.folder} was trained on captions alone and cannot judge images. Train it on quadruples with images."
            )
        return self.card.image.probability(self.root_distances(self.image_points(images)))

    def root_distances(self, points: Float[Tensor, "item dim"]) -> Float[np.ndarray, " item"]:
        """Distances to the root."""
        return root_distance(points, self.curvature).double().cpu().numpy()

    def category_scores(self, points: Float[Tensor, "item dim"]) -> list[dict[str, float]]:
        """Of every category, ``exp(-d)`` with d the distance to its nearest unsafe caption, in (0, 1]."""
        closest = (-distance_table(points.cpu(), self.captions.points, self.curvature)).exp().double().numpy()
        names = sorted(set(self.captions.categories))
        columns = {name: [i for i, own in enumerate(self.captions.categories) if own == name] for name in names}
        return [{name: float(row[columns[name]].max()) for name in names} for row in closest]

    @torch.no_grad()
    def _points(self, features: Float[Tensor, "row dim"], modality: Modality) -> Float[Tensor, "row dim"]:
        check_points(f"{modality} features of {self.encoder.folder}", features)
        return self.space.points(features, modality)


def save_hyperbolic(folder: Path, space: HyperbolicSpace, card: HyperbolicCard, captions: UnsafeCaptions) -> None:
    """Write `TENSORS` and `CARD`; the adapter is its trainer's to save."""
    with atomic_path(folder / TENSORS) as temporary:
        save_file({**space.tensors(), "unsafe_captions": captions.points.contiguous()}, temporary)
    write_json(folder / CARD, {"format": FORMAT, **asdict(card), "unsafe_captions": list(captions.categories)})


def load_hyperbolic(folder: Path, *, device: str = "auto", encoder: ClipEncoder | None = None) -> HyperbolicClip:
    """Read a folder of ``valign train hysac``, or of such a detector.

    Args: encoder: Its CLIP with the adapters merged; None reads what the card names.
    Raises: UserError if a file is missing or broken, or the CLIP is another than it was trained on.
    """
    values = read_json(folder / CARD)
    try:
        if values["format"] != FORMAT:
            raise UserError(f"{folder / CARD} must be of format {FORMAT}, got {values['format']}. Train it with this valign.")
        image = values["image"]
        card = HyperbolicCard(
            bounds=GroupBounds(**values["bounds"]),
            text=DistanceLimit(**values["text"]),
            image=None if image is None else DistanceLimit(**image),
            notes=values["notes"],
        )
        tensors = load_file(folder / TENSORS)
        check_finite(folder / TENSORS, tensors)
        points = tensors.pop("unsafe_captions")
        place, adapters = folder / str(card.notes["encoder"]), [folder / name for name in card.notes["adapters"]]
        found = encoder or ClipEncoder(place, device=device, adapters=adapters)
        if found.weights_sha256 != card.notes["encoder_sha256"]:
            raise UserError(
                f"{folder} was trained on encoder {card.notes['encoder_sha256'][:12]}, got {found.weights_sha256[:12]}. Restore "
                "that encoder and its adapter, or train it again."
            )
        return HyperbolicClip(
            found, HyperbolicSpace.of(tensors, found.dim), card, UnsafeCaptions(points, tuple(values["unsafe_captions"]))
        )
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} does not hold a hyperbolic CLIP ({error}). Train it with `valign train hysac`.") from error
