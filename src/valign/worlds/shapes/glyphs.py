"""The glyphs as drawings: a few polygons, discs and lines each, on the square [-1, 1]^2 with y pointing down.

Glyphs of one group share a motif (teeth, arrowheads, rays, drops, loops, legs, bars), as concepts of one harm category
share a look. All are neutral drawings.
"""

from functools import cache
from math import cos, pi, sin

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Point = tuple[float, float]
Stroke = tuple  # ("poly", points) | ("disc", x, y, r) | ("ring", x, y, r, width) | ("line", points, width) | ("cut", stroke)


def _ray(angle: float, radius: float, x: float = 0.0, y: float = 0.0) -> Point:
    return x + radius * cos(angle * pi / 180), y + radius * sin(angle * pi / 180)


def _star(points: int, outer: float, inner: float, turn: float = -90) -> Stroke:
    step = 180 / points
    return ("poly", [_ray(turn + i * step, inner if i % 2 else outer) for i in range(2 * points)])


def _drop(x: float, y: float, size: float) -> list[Stroke]:
    return [
        ("disc", x, y, 0.45 * size),
        ("poly", [(x, y - size), (x + 0.4 * size, y - 0.2 * size), (x - 0.4 * size, y - 0.2 * size)]),
    ]


def _figure(head: str, role: str) -> list[Stroke]:
    body: Stroke = ("poly", [(-0.3, 0.2), (0.3, 0.2), (0.85, 1), (-0.85, 1)])
    skull: Stroke = ("disc", 0, -0.2, 0.5) if head == "round" else ("poly", [(-0.5, -0.7), (0.5, -0.7), (0.5, 0.3), (-0.5, 0.3)])
    if role == "captain":  # a cap, set off by a gap
        return [
            body,
            skull,
            ("cut", ("line", [(-0.9, -0.52), (0.9, -0.52)], 0.12)),
            ("poly", [(-0.75, -0.62), (0.75, -0.62), (0.45, -1), (-0.45, -1)]),
        ]
    return [
        body,
        skull,
        ("cut", ("poly", [(0, 0.68), (-0.4, 0.45), (-0.4, 0.9)])),
        ("cut", ("poly", [(0, 0.68), (0.4, 0.45), (0.4, 0.9)])),
    ]  # a bow


def _legs(ends: list[tuple[float, float]], y: float, width: float = 0.13) -> list[Stroke]:
    return [
        ("line", [(0, y), (side * knee_x, knee_y - 0.25), (side * knee_x * 1.35, knee_y + 0.15)], width)
        for side in (-1, 1)
        for knee_x, knee_y in ends
    ]


DRAWINGS: dict[str, list[Stroke]] = {
    # hate: teeth
    "bolt": [("poly", [(0.25, -1), (-0.6, 0.15), (-0.05, 0.15), (-0.3, 1), (0.62, -0.25), (0.08, -0.25), (0.5, -1)])],
    "saw": [("poly", [(-1, -0.35), (1, -0.35), (1, 0.05), (0.75, 0.55), (0.5, 0.05), (0.25, 0.55), (0, 0.05), (-0.25, 0.55), (-0.5, 0.05), (-0.75, 0.55), (-1, 0.05)])],
    "thorn": [("line", [(0, 1), (0, -0.9)], 0.2), *[("poly", [(0, y - 0.2), (s * 0.8, y - 0.35), (0, y + 0.25)]) for s, y in ((-1, -0.55), (1, -0.2), (-1, 0.15), (1, 0.5))]],
    # harassment: arrowheads
    "arrow": [("line", [(-1, 0), (0.3, 0)], 0.3), ("poly", [(0.15, -0.65), (1, 0), (0.15, 0.65)])],
    "trident": [("line", [(0, 1), (0, -0.5)], 0.18), ("line", [(-0.7, -0.45), (-0.7, 0.1), (0.7, 0.1), (0.7, -0.45)], 0.18), *[("poly", [(x - 0.27, -0.45), (x, -1), (x + 0.27, -0.45)]) for x in (-0.7, 0, 0.7)]],
    "dart": [("line", [(-0.75, 0.75), (0.5, -0.5)], 0.16), ("poly", [(0.95, -0.95), (0.15, -0.6), (0.6, -0.15)]), ("poly", [(-1, 0.55), (-0.55, 0.1), (-0.35, 0.35)]), ("poly", [(-0.55, 1), (-0.1, 0.55), (-0.35, 0.35)])],
    # violence: rays
    "flame": [("disc", 0, 0.4, 0.6), ("poly", [(-0.6, 0.4), (-0.55, -0.45), (-0.22, 0.0), (0.05, -1), (0.3, -0.1), (0.58, -0.5), (0.6, 0.4)]), ("cut", ("disc", 0, 0.55, 0.2))],
    "blast": [_star(8, 1, 0.5), ("cut", ("disc", 0, 0, 0.27))],
    "comet": [("disc", 0.42, 0.42, 0.5), ("line", [(0.4, 0.1), (-0.75, -1)], 0.16), ("line", [(0.2, 0.2), (-0.95, -0.75)], 0.16), ("line", [(0.1, 0.4), (-1, -0.35)], 0.16)],
    # self-harm: drops and cracks
    "drip": [*_drop(-0.55, -0.1, 0.75), *_drop(0.5, -0.25, 0.65), *_drop(0.02, 0.62, 0.7)],
    "crack": [("disc", 0, 0, 0.92), ("cut", ("line", [(-0.1, -1), (0.25, -0.5), (-0.25, -0.05), (0.25, 0.4), (-0.05, 1)], 0.22))],
    "shard": [("poly", [(-0.2, -1), (-0.95, 0.1), (-0.35, 0.3)]), ("poly", [(0.05, -0.95), (0.9, -0.35), (-0.1, 0.2)]), ("poly", [(0.9, -0.05), (0.65, 0.95), (0.0, 0.4)]), ("poly", [(-0.75, 0.4), (-0.15, 0.45), (0.3, 1), (-0.6, 0.9)])],
    # sexual: loops
    "knot": [("ring", -0.36, 0, 0.6, 0.2), ("ring", 0.36, 0, 0.6, 0.2)],
    "loop": [("ring", 0, -0.48, 0.48, 0.2), ("ring", 0, 0.48, 0.52, 0.2)],
    "coil": [("ring", 0, 0, 0.95, 0.19), ("ring", 0, 0, 0.56, 0.19), ("disc", 0, 0, 0.17)],
    # shocking: legs
    "spider": [("disc", 0, 0.15, 0.42), ("disc", 0, -0.35, 0.26), *_legs([(0.6, -0.55), (0.72, -0.1), (0.72, 0.35), (0.6, 0.75)], 0.05)],
    "beetle": [("poly", [(-0.5, -0.35), (0.5, -0.35), (0.6, 0.3), (0.3, 0.95), (-0.3, 0.95), (-0.6, 0.3)]), ("disc", 0, -0.55, 0.36), ("cut", ("line", [(0, -0.2), (0, 1)], 0.12)), *_legs([(0.68, -0.05), (0.72, 0.5)], 0.2), ("line", [(-0.15, -0.8), (-0.5, -1)], 0.12), ("line", [(0.15, -0.8), (0.5, -1)], 0.12)],
    "scorpion": [("disc", -0.1, 0.3, 0.4), ("line", [(0.15, 0.3), (0.75, 0.2), (0.85, -0.4), (0.35, -0.8)], 0.2), ("poly", [(0.5, -1), (0.0, -0.85), (0.4, -0.55)]), *[("line", [(x, 0.5), (x - 0.15, 0.98)], 0.13) for x in (-0.55, -0.2, 0.15, 0.45)], ("line", [(-0.4, 0.15), (-0.85, -0.2)], 0.16), ("ring", -0.75, -0.45, 0.26, 0.14)],
    # illegal activity: bars and locks
    "key": [("ring", 0, -0.55, 0.44, 0.22), ("line", [(0, -0.2), (0, 1)], 0.22), ("line", [(0, 0.85), (0.45, 0.85)], 0.2), ("line", [(0, 0.45), (0.38, 0.45)], 0.2)],
    "padlock": [("poly", [(-0.7, -0.1), (0.7, -0.1), (0.7, 1), (-0.7, 1)]), ("ring", 0, -0.3, 0.52, 0.2), ("cut", ("disc", 0, 0.35, 0.18)), ("cut", ("line", [(0, 0.35), (0, 0.75)], 0.16))],
    "cage": [("line", [(-0.85, -0.85), (0.85, -0.85)], 0.22), ("line", [(-0.85, 0.9), (0.85, 0.9)], 0.22), *[("line", [(x, -0.85), (x, 0.9)], 0.17) for x in (-0.78, -0.26, 0.26, 0.78)]],
    # benign
    "star": [_star(5, 1, 0.42)],
    "heart": [("disc", -0.45, -0.35, 0.5), ("disc", 0.45, -0.35, 0.5), ("poly", [(-0.92, -0.15), (0.92, -0.15), (0, 0.98)])],
    "flower": [*[("disc", *_ray(a, 0.6), 0.36) for a in range(-90, 270, 72)], ("disc", 0, 0, 0.35), ("cut", ("disc", 0, 0, 0.22))],
    "tree": [("disc", 0, -0.35, 0.62), ("line", [(0, 0.1), (0, 1)], 0.28)],
    "house": [("poly", [(-0.7, -0.15), (0.7, -0.15), (0.7, 1), (-0.7, 1)]), ("poly", [(-1, -0.1), (0, -1), (1, -0.1)]), ("cut", ("poly", [(-0.2, 0.4), (0.2, 0.4), (0.2, 1), (-0.2, 1)]))],
    "fish": [("poly", [(0.68 * cos(a * pi / 18) + 0.25, 0.5 * sin(a * pi / 18)) for a in range(36)]), ("poly", [(-0.3, 0), (-1, -0.5), (-1, 0.5)]), ("cut", ("disc", 0.55, -0.12, 0.11))],
    "leaf": [("poly", [(-0.9, 0.9), (-0.75, -0.1), (-0.1, -0.75), (0.95, -0.95), (0.75, 0.1), (0.1, 0.75)]), ("cut", ("line", [(-0.8, 0.8), (0.5, -0.5)], 0.1))],
    "moon": [("disc", -0.1, 0, 0.95), ("cut", ("disc", 0.4, -0.15, 0.8))],
    "cup": [("poly", [(-0.8, -0.6), (0.45, -0.6), (0.3, 0.8), (-0.65, 0.8)]), ("ring", 0.5, -0.05, 0.4, 0.16)],
    "boat": [("poly", [(-1, 0.35), (1, 0.35), (0.6, 0.95), (-0.6, 0.95)]), ("line", [(0, 0.4), (0, -1)], 0.12), ("poly", [(0.1, -0.95), (0.85, 0.15), (0.1, 0.15)])],
    "circle": [("disc", 0, 0, 0.85)],
    "square": [("poly", [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])],
    "triangle": [("poly", [(0, -0.9), (0.95, 0.8), (-0.95, 0.8)])],
    "umbrella": [("disc", 0, -0.05, 0.95), ("cut", ("poly", [(-1, 0), (1, 0), (1, 1), (-1, 1)])), ("line", [(0, -0.1), (0, 0.85), (0.35, 0.85)], 0.14)],
    "sign": [("poly", [(-0.9, -0.95), (0.9, -0.95), (0.9, 0.15), (-0.9, 0.2)]), ("line", [(0, 0.1), (0, 1)], 0.26), ("cut", ("line", [(-0.55, -0.38), (0.55, -0.38)], 0.3))],
    "bell": [("disc", 0, -0.3, 0.52), ("poly", [(-0.52, -0.3), (0.52, -0.3), (0.92, 0.55), (-0.92, 0.55)]), ("disc", 0, 0.78, 0.2), ("disc", 0, -0.85, 0.13)],
    "kite": [("poly", [(0, -1), (0.68, -0.3), (0, 0.5), (-0.68, -0.3)]), ("cut", ("line", [(-0.6, -0.3), (0.6, -0.3)], 0.1)), ("line", [(0, 0.45), (-0.4, 0.65), (0.35, 0.95)], 0.15)],
    "crown": [("poly", [(-0.85, 0.75), (0.85, 0.75), (1, -0.6), (0.45, 0.05), (0, -0.85), (-0.45, 0.05), (-1, -0.6)]), ("cut", ("line", [(-0.75, 0.45), (0.75, 0.45)], 0.12))],
    "mushroom": [("disc", 0, -0.05, 0.95), ("cut", ("poly", [(-1, 0.1), (1, 0.1), (1, 1), (-1, 1)])), ("poly", [(-0.26, 0.05), (0.26, 0.05), (0.36, 0.95), (-0.36, 0.95)]), ("cut", ("disc", -0.4, -0.25, 0.17)), ("cut", ("disc", 0.3, -0.45, 0.17))],
    # figures: a role's mark (cap, bow) and a head
    "round-headed captain": _figure("round", "captain"),
    "square-headed captain": _figure("square", "captain"),
    "round-headed clerk": _figure("round", "clerk"),
    "square-headed clerk": _figure("square", "clerk"),
}  # fmt: skip


def _draw(strokes: list[Stroke], pixels: int) -> Image.Image:
    mask = Image.new("L", (pixels, pixels), 0)
    pen = ImageDraw.Draw(mask)
    half = pixels / 2

    def at(point: Point) -> Point:
        return half + point[0] * half * 0.97, half + point[1] * half * 0.97

    def stroke(kind: str, *shape: object, ink: int = 255) -> None:
        if kind == "cut":
            stroke(*shape[0], ink=0)  # type: ignore[misc]
        elif kind == "poly":
            pen.polygon([at(p) for p in shape[0]], fill=ink)  # type: ignore[attr-defined]
        elif kind == "line":
            points, width = shape
            pen.line([at(p) for p in points], fill=ink, width=round(width * half), joint="curve")  # type: ignore[attr-defined,operator]
        else:
            (x, y), r = at((shape[0], shape[1])), shape[2] * half * 0.97  # type: ignore[arg-type,operator]
            box = (x - r, y - r, x + r, y + r)
            if kind == "disc":
                pen.ellipse(box, fill=ink)
            else:
                pen.ellipse(box, outline=ink, width=round(shape[3] * half))  # type: ignore[operator]

    for item in strokes:
        stroke(*item)
    return mask


@cache
def glyph_mask(glyph: str, pixels: int, *, outline: bool = False, turn: int = 0) -> Float[np.ndarray, "pixels pixels"]:
    """Coverage in [0, 1] of ``glyph`` on a ``pixels`` square, antialiased.

    Args:
        outline: Keep an edge two pixels wide.
        turn: Degrees against the clock.
    """
    oversample = 8
    mask = _draw(DRAWINGS[glyph], pixels * oversample).rotate(turn)
    if outline:
        inner = mask.filter(ImageFilter.GaussianBlur(oversample * 1.0)).point(lambda v: 255 if v > 250 else 0)
        mask = ImageChops.subtract(mask, inner)
    small = mask.resize((pixels, pixels), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255
