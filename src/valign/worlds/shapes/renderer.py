"""Scenes to pixels: flat backgrounds, one glyph per place, four drawing styles; 64 x 64, seeded jitter."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float
from PIL import Image

from valign.worlds.shapes.glyphs import glyph_mask

SIZE = 64  # pixels, height and width
GLYPH_PIXELS = (26, 27, 28, 29)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 40),
    "orange": (245, 138, 20),
    "green": (28, 138, 62),
    "blue": (32, 84, 222),
    "purple": (128, 44, 176),
    "pink": (242, 96, 172),
    "brown": (128, 74, 34),
    "black": (24, 24, 28),
}
CORNERS: dict[str, tuple[int, int]] = {
    "top-left": (16, 16),
    "top-right": (48, 16),
    "bottom-left": (16, 48),
    "bottom-right": (48, 48),
}
MIDDLES: dict[str, tuple[int, int]] = {"left": (16, 32), "right": (48, 32), "top": (32, 16), "bottom": (32, 48), "centre": (32, 32)}
PLACES = MIDDLES | CORNERS
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {  # colour above, colour below
    "paper": ((252, 252, 250), (252, 252, 250)),
    "fog": ((196, 200, 206), (218, 221, 225)),
    "meadow": ((214, 234, 250), (190, 226, 168)),
    "beach": ((198, 226, 244), (244, 226, 180)),
    "dusk": ((222, 204, 242), (252, 214, 196)),
}
STYLES = ("flat", "outline", "shadow", "tilted")
TILT = 30  # degrees against the clock
SPLIT = {"meadow", "beach"}  # a horizon instead of a gradient


@dataclass(frozen=True)
class Item:
    """One glyph in a scene."""

    glyph: str
    colour: str
    place: str


@dataclass(frozen=True)
class Scene:
    """What an image shows: one item, two at opposite places, or three in corners."""

    items: tuple[Item, ...]
    background: str
    style: str


@cache
def background(name: str) -> Float[np.ndarray, "64 64 3"]:
    """The empty canvas of a background, pixels in [0, 255]; shared, so copy before drawing."""
    above, below = (np.array(c, dtype=np.float32) for c in BACKGROUNDS[name])
    ramp = np.linspace(0, 1, SIZE, dtype=np.float32)
    if name in SPLIT:
        ramp = (ramp > 0.62).astype(np.float32)
    rows = above + ramp[:, None] * (below - above)
    return np.repeat(rows[:, None, :], SIZE, axis=1)


def _blend(canvas: np.ndarray, mask: np.ndarray, x: int, y: int, colour: np.ndarray, strength: float = 1.0) -> None:
    pixels = len(mask)
    left, top = x - pixels // 2, y - pixels // 2
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + pixels, SIZE), min(top + pixels, SIZE)
    part = strength * mask[y0 - top : y1 - top, x0 - left : x1 - left, None]
    canvas[y0:y1, x0:x1] += part * (colour - canvas[y0:y1, x0:x1])


def render_array(scene: Scene, rng: np.random.Generator) -> Float[np.ndarray, "64 64 3"]:
    """Pixels in [0, 255], float32. ``rng`` draws each glyph's size (26 to 29 px) and its offset (up to 2 px)."""
    canvas = background(scene.background).copy()
    for item in scene.items:
        pixels = int(rng.choice(GLYPH_PIXELS))
        dx, dy = rng.integers(-2, 3, size=2)
        x, y = PLACES[item.place][0] + int(dx), PLACES[item.place][1] + int(dy)
        colour = np.array(COLOURS[item.colour], dtype=np.float32)
        mask = glyph_mask(item.glyph, pixels, outline=scene.style == "outline", turn=TILT if scene.style == "tilted" else 0)
        if scene.style == "shadow":
            _blend(canvas, mask, x + 3, y + 3, np.zeros(3, dtype=np.float32), strength=0.35)
        _blend(canvas, mask, x, y, colour)
    return canvas


def render(scene: Scene, seed: int) -> Image.Image:
    """The scene as a 64 x 64 RGB image; the same seed gives the same bytes."""
    return Image.fromarray(render_array(scene, np.random.default_rng(seed)).round().clip(0, 255).astype(np.uint8))
