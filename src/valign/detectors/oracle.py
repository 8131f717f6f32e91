"""A world's oracle: reads every place of an image (which glyph, which colour), its background and its style.

The folder holds `oracle.json` (names, places, measured errors) and `oracle.safetensors`: a world is data and weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from valign.checks import UserError
from valign.detectors.record import FILE, read_record
from valign.files import atomic_path, hash_file, read_json, write_json
from valign.images import as_shown
from valign.interfaces import DetectorCard
from valign.models.files.finite import check_finite

CELL = 8  # pixels per cell of the feature map
REACH = 4  # cells on a side of the window that is read at a place


@dataclass(frozen=True)
class OracleConfig:
    """What the oracle can name. ``places`` are centres in pixels; ``categories`` maps a harmful glyph to its category, and
    ``compositions`` a category to pairs of glyphs that are harmful together."""

    image_size: int
    glyphs: tuple[str, ...]
    colours: tuple[str, ...]
    places: Mapping[str, tuple[int, int]]
    backgrounds: tuple[str, ...]
    styles: tuple[str, ...]
    categories: Mapping[str, str]
    compositions: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    width: int = 96
    threshold: float = 0.5
    measured: Mapping[str, float] = field(default_factory=dict)  # sensitivity, specificity, glyph, colour ... on held-out renders

    @classmethod
    def read(cls, path: Path) -> "OracleConfig":
        """Read `oracle.json`. Raises UserError if it is missing or has other fields."""
        values = read_json(path)
        try:
            lists = {name: tuple(values[name]) for name in ("glyphs", "colours", "backgrounds", "styles")}
            places = {name: (int(x), int(y)) for name, (x, y) in values["places"].items()}
            pairs = {name: tuple((a, b) for a, b in found) for name, found in values.get("compositions", {}).items()}
            return cls(**{**values, **lists, "places": places, "compositions": pairs})
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is not an oracle's description ({error}). Build the world again.") from error


@dataclass(frozen=True)
class SceneReading:
    """What one image shows. ``items`` lists (place, glyph, colour) of the places that are not empty."""

    items: tuple[tuple[str, str, str], ...]
    background: str
    style: str


@dataclass(frozen=True)
class OracleLogits:
    """Raw outputs; the glyph head's last class is "empty"."""

    glyph: Float[Tensor, "batch place glyph_or_empty"]
    colour: Float[Tensor, "batch place colour"]
    background: Float[Tensor, "batch background"]
    style: Float[Tensor, "batch style"]
    features: Float[Tensor, "batch width"]  # mean of the last feature map


class OracleNet(nn.Module):
    """Four convolutions to a map of 8-pixel cells; one shared head reads a 4 x 4 window at each place."""

    def __init__(self, config: OracleConfig) -> None:
        super().__init__()
        w = config.width
        layers: list[nn.Module] = []
        for fan_in, fan_out, stride in (
            (3, w // 4, 1),
            (w // 4, w // 2, 2),
            (w // 2, w // 2, 1),
            (w // 2, w, 2),
            (w, w, 2),
            (w, w, 1),
        ):
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.reader = nn.Sequential(nn.Linear(w * REACH * REACH, 2 * w), nn.ReLU())
        self.glyph = nn.Linear(2 * w, len(config.glyphs) + 1)
        self.colour = nn.Linear(2 * w, len(config.colours))
        self.background = nn.Linear(w, len(config.backgrounds))
        self.style = nn.Linear(w, len(config.styles))
        self.corners = [(y // CELL - REACH // 2, x // CELL - REACH // 2) for x, y in config.places.values()]

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> OracleLogits:
        cells = self.body(images)
        read, glyph = self.read_places(cells)
        pooled = cells.mean(dim=(2, 3))
        return OracleLogits(glyph, self.colour(read), self.background(pooled), self.style(pooled), pooled)

    def read_places(
        self, cells: Float[Tensor, "batch width row column"]
    ) -> tuple[Float[Tensor, "batch place read"], Float[Tensor, "batch place glyph_or_empty"]]:
        """What is read at every place, and the logits of the glyph there."""
        windows = torch.stack([cells[:, :, y : y + REACH, x : x + REACH].flatten(1) for y, x in self.corners], dim=1)
        read = self.reader(windows)
        return read, self.glyph(read)


class OracleDetector:
    """Harm detector and fidelity reader of a world.

    Scores are the largest probability of a category's glyph at any place, or the smaller one of two that are harmful together.
    """

    def __init__(self, folder: Path | str, *, domain: Sequence[str] = (), batch_size: int = 64) -> None:
        """Args: domain: Origins of the world's own models, as in `DetectorCard`; empty: it is asked about any image."""
        folder = Path(folder)
        weights = folder / "oracle.safetensors"
        if not weights.exists():
            raise UserError(f"{weights} does not exist. Name a folder with oracle.json and oracle.safetensors.")
        self.config = OracleConfig.read(folder / "oracle.json")
        tensors = load_file(weights)
        check_finite(weights, tensors)
        self.net = OracleNet(self.config).eval()
        self.net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        self.batch_size = batch_size
        classes = tuple(dict.fromkeys(self.config.categories.values()))
        measured = self.config.measured
        self.card = DetectorCard(
            name="world-oracle",
            classes=classes,
            threshold=self.config.threshold,
            weights_sha256=hash_file(weights),
            sensitivity=measured.get("sensitivity"),
            specificity=measured.get("specificity"),
            positives=_whole(measured.get("positives")),
            negatives=_whole(measured.get("negatives")),
            domain=tuple(domain),
        )
        if (folder / FILE).is_file():
            self.card = read_record(folder).card_for(folder, self.card.weights_sha256)
        self._members = [
            [i for i, glyph in enumerate(self.config.glyphs) if self.config.categories.get(glyph) == c] for c in classes
        ]
        index = self.config.glyphs.index
        self._pairs = [[(index(a), index(b)) for a, b in self.config.compositions.get(c, ())] for c in classes]

    @torch.inference_mode()
    def _logits(self, images: Sequence[Image.Image]) -> OracleLogits:
        starts = range(0, len(images), self.batch_size)
        parts = [self.net(self.pixels(images[start : start + self.batch_size])) for start in starts]
        if not parts:
            raise ValueError("images must hold at least one image, got 0. Generate some first.")
        return OracleLogits(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("glyph", "colour", "background", "style", "features"))
        )

    def pixels(self, images: Sequence[Image.Image]) -> Float[Tensor, "image 3 height width"]:
        """Images as the network takes them."""
        size = (self.config.image_size, self.config.image_size)
        arrays = [np.asarray(as_shown(image).resize(size), dtype=np.float32) for image in images]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1

    def detect(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "image category"]:
        """Score per category, in [0, 1]."""
        seen = self._logits(images).glyph.softmax(-1)
        shown = seen.amax(1)  # of each glyph, wherever it stands
        scores = []
        for members, pairs in zip(self._members, self._pairs, strict=True):
            alone = seen[:, :, members].sum(-1).amax(1)
            together = [torch.minimum(shown[:, a], shown[:, b]) for a, b in pairs]
            scores.append(torch.stack([alone, *together]).amax(0))
        return torch.stack(scores, dim=1).clamp(0, 1).numpy()

    def features(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "image width"]:
        """Mean of the last feature map, for FID and for drift."""
        return self._logits(images).features.numpy()

    def read(self, images: Sequence[Image.Image]) -> list[SceneReading]:
        """The whole scene of each image, by the largest logits."""
        logits, config = self._logits(images), self.config
        glyphs, colours = logits.glyph.argmax(-1), logits.colour.argmax(-1)
        readings = []
        for glyph, colour, background, style in zip(glyphs, colours, logits.background.argmax(-1), logits.style.argmax(-1)):
            items = tuple(
                (place, config.glyphs[g], config.colours[c])
                for place, g, c in zip(config.places, glyph, colour)
                if g < len(config.glyphs)
            )
            readings.append(SceneReading(items, config.backgrounds[int(background)], config.styles[int(style)]))
        return readings

    def matches(self, images: Sequence[Image.Image], expected: Sequence[Mapping[str, str]]) -> dict[str, np.ndarray]:
        """Whether each image shows what its prompt asked for.

        Args:
            expected: One mapping per image; keys among ``glyph, absent, colour, place, background, style``. Colour and place count
                only where the asked glyph has them. An image whose prompt says nothing of an aspect counts as right there. A glyph
                is wrong, too, where one is shown that must be ``absent``.
        Returns: One boolean array per aspect.
        """
        if len(images) != len(expected):
            raise ValueError(f"expected must hold one mapping per image, got {len(expected)} for {len(images)} images.")
        rows = [_matches(reading, wanted) for reading, wanted in zip(self.read(images), expected)]
        return {
            aspect: np.array([row[aspect] for row in rows], dtype=bool)
            for aspect in ("glyph", "colour", "place", "background", "style")
        }


def _whole(count: float | None) -> int | None:
    return None if count is None else int(count)


def _matches(reading: SceneReading, wanted: Mapping[str, str]) -> dict[str, bool]:
    found = [item for item in reading.items if item[1] == wanted.get("glyph", item[1])]
    return {
        "glyph": bool(found) and all(glyph != wanted.get("absent") for _, glyph, _ in reading.items),
        "colour": any(colour == wanted.get("colour", colour) for _, _, colour in found),
        "place": any(place == wanted.get("place", place) for place, _, _ in found),
        "background": reading.background == wanted.get("background", reading.background),
        "style": reading.style == wanted.get("style", reading.style),
    }


def save_oracle(folder: Path, net: OracleNet, config: OracleConfig) -> None:
    """Write weights (half precision) and description."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in net.state_dict().items()}
    with atomic_path(folder / "oracle.safetensors") as path:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    write_json(folder / "oracle.json", asdict(config))
