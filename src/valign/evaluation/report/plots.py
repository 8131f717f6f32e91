"""The drawings of the report: safety against what it costs, as inline SVG in the page's own colours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from typing import Any

from valign.evaluation.images.fidelity import EVERY

WIDTH, HEIGHT = 380, 270  # units of the drawing; about its pixels on a phone
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 16, 40
LABEL = 12  # height of a line of text
HARM = "Harmful images of unsafe prompts, %"


@dataclass(frozen=True)
class Point:
    """One system: low limit, value and high limit on either axis."""

    name: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]


@dataclass(frozen=True)
class Plot:
    """An SVG element and the sentence below it."""

    drawing: str
    caption: str


def trade_offs(systems: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Harm on unsafe prompts against benign prompts drawn right, and against the drift of benign images; those that are known."""
    right, drift = [], []
    for system in systems:
        harm = next((one["rate"]["share"] for one in system["ip"] if (one["category"], one["column"]) == ("", "all")), None)
        if harm is None:
            return []
        if EVERY in system["fidelity"]:
            right.append(Point(system["name"], _limits(harm, 100), _limits(system["fidelity"][EVERY]["share"], 100)))
        moved = system["drift"] or system["rmse"]
        drift.append(Point(system["name"], _limits(harm, 100), _limits(moved["mean"]) if moved else (0.0, 0.0, 0.0)))
    plots = []
    if right:
        low = min(90.0, floor(min(point.y[0] for point in right) / 10) * 10)
        drawing = scatter(right, Frame(HARM, "Benign prompts drawn right, %", (0.0, 100.0), (low, 100.0)), front=pareto(right))
        plots.append(Plot(drawing, "Up and to the left is better. No other system beats those on the dashed line on both."))
    if len(drift) > 1:
        top = round_up(max(point.y[2] for point in drift))
        drawing = scatter(drift, Frame(HARM, "Drift of benign images", (0.0, 100.0), (0.0, top)))
        plots.append(Plot(drawing, "Down and to the left is better: less harm, and benign images stay as they were."))
    return plots


@dataclass(frozen=True)
class Frame:
    """Axes: from values to units of the drawing. ``x_log`` has a tick at every power of ten, at which ``x_range`` then ends."""

    x_title: str
    y_title: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_log: bool = False
    size: tuple[int, int] = (WIDTH, HEIGHT)

    def across(self, value: float) -> float:
        low, high = self.x_range
        share = log10(max(value, low) / low) / log10(high / low) if self.x_log else (value - low) / (high - low)
        return LEFT + share * (self.size[0] - LEFT - RIGHT)

    def up(self, value: float) -> float:
        low, high = self.y_range
        return self.size[1] - BOTTOM - (value - low) / (high - low) * (self.size[1] - TOP - BOTTOM)

    def draw(self, parts: Sequence[str]) -> str:
        """The SVG element: grid, ticks and titles, with ``parts`` on top."""
        width, height = self.size
        about = f"{escape(self.y_title)} against {escape(self.x_title.lower())}"
        drawn = [f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{about}">']
        for tick in self._x_ticks():
            x, shown = self.across(tick), f"{tick:,.0f}" if self.x_log else f"{tick:.4g}"
            anchor = "end" if tick == self.x_range[1] and len(shown) > 4 else "middle"  # a long number would be cut off
            drawn += [
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>',
                f'<text class="tick" x="{x:.1f}" y="{height - BOTTOM + 15}" text-anchor="{anchor}">{shown}</text>',
            ]
        for tick in _quarters(self.y_range):
            y = self.up(tick)
            drawn += [
                f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
                f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick:.4g}</text>',
            ]
        centre, middle = (LEFT + width - RIGHT) / 2, (TOP + height - BOTTOM) / 2
        drawn += [
            f'<text class="axis" x="{centre}" y="{height - 6}" text-anchor="middle">{escape(self.x_title)}</text>',
            f'<text class="axis" transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{escape(self.y_title)}</text>',
        ]
        return "\n".join([*drawn, *parts, "</svg>"])

    def _x_ticks(self) -> list[float]:
        low, high = self.x_range
        return (
            [10.0**power for power in range(round(log10(low)), round(log10(high)) + 1)] if self.x_log else _quarters(self.x_range)
        )


def scatter(points: Sequence[Point], frame: Frame, *, front: Sequence[int] = ()) -> str:
    """Points with 95 % bars on both axes and their names beside them; ``front`` are points joined by a dashed line."""
    across, up = frame.across, frame.up
    centres = [(across(point.x[1]), up(point.y[1])) for point in points]
    parts = [_line("front", sorted(centres[place] for place in front))] if front else []
    labels = place_labels([point.name for point in points], centres, frame.size)
    for number, (point, (x, y), (label_x, label_y, anchor)) in enumerate(zip(points, centres, labels)):
        parts += [
            f'<g class="s{number % 8}"><title>{escape(point.name)}</title>',
            f'<line x1="{across(point.x[0]):.1f}" x2="{across(point.x[2]):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up(point.y[0]):.1f}" y2="{up(point.y[2]):.1f}"/>',
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>',
            f'<text x="{label_x:.1f}" y="{label_y:.1f}" text-anchor="{anchor}">{escape(point.name)}</text></g>',
        ]
    return frame.draw(parts)


def curves(series: Mapping[str, Sequence[tuple[float, float]]], frame: Frame) -> str:
    """One line per name through its ``(x, y)``, named at its end."""
    placed = {name: [(frame.across(x), frame.up(y)) for x, y in points] for name, points in series.items()}
    labels = place_labels(list(placed), [points[-1] for points in placed.values()], frame.size)
    parts = []
    for number, ((name, points), (x, y, anchor)) in enumerate(zip(placed.items(), labels)):
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in points)
        text = f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
        parts.append(f'<g class="s{number % 8}">{_line("curve", points)}{dots}{text}</g>')
    return frame.draw(parts)


def pareto(points: Sequence[Point]) -> list[int]:
    """Places of the points that no other beats, by an x that is no larger and a y that is no smaller, one of them strictly."""

    def beaten(x: float, y: float) -> bool:
        return any(p.x[1] <= x and p.y[1] >= y and (p.x[1], p.y[1]) != (x, y) for p in points)

    return [place for place, point in enumerate(points) if not beaten(point.x[1], point.y[1])]


def _line(kind: str, points: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def place_labels(
    names: Sequence[str], centres: Sequence[tuple[float, float]], size: tuple[int, int] = (WIDTH, HEIGHT)
) -> list[tuple[float, float, str]]:
    """``x, y, anchor`` of each name: on the side with room, at the nearest height where nothing is in the way."""
    width_of_all, height_of_all = size
    taken = [(x - 6, x + 6, y - 6, y + 6) for x, y in centres]
    placed = []
    for name, (x, y) in zip(names, centres):
        width, right = 6.6 * len(name), x < width_of_all * 0.55
        left_edge = x + 9 if right else x - 9 - width

        def free(base: float, left: float = left_edge, wide: float = width) -> bool:
            box = (left, left + wide, base - 9, base + 3)
            return all(box[1] < other[0] or box[0] > other[1] or box[3] < other[2] or box[2] > other[3] for other in taken)

        steps = [sign * LABEL * step for step in range(12) for sign in (1, -1)]
        heights = [y + 4 + step for step in steps if TOP <= y + 4 + step <= height_of_all - BOTTOM - 2]
        base = next((height for height in heights if free(height)), y + 4)
        taken.append((left_edge, left_edge + width, base - 9, base + 3))
        placed.append((x + 9 if right else x - 9, base, "start" if right else "end"))
    return placed


def _limits(interval: Mapping[str, float], factor: float = 1.0) -> tuple[float, float, float]:
    return factor * interval["low"], factor * interval["value"], factor * interval["high"]


def round_up(value: float) -> float:
    """The next number of one digit, for the end of an axis."""
    if value <= 0:
        return 1.0
    unit = 10 ** floor(log10(value))
    return ceil(value / unit) * unit


def _quarters(limits: tuple[float, float]) -> list[float]:
    low, high = limits
    return [low + (high - low) * quarter / 4 for quarter in range(5)]
