"""The drawings of the report: safety against what it costs, as inline SVG in the page's own colours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from typing import Any

from valign.evaluation.fidelity import EVERY

WIDTH, HEIGHT = 380, 270  # units of the drawing; about its pixels on a phone
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 16, 40
LABEL = 12  # height of a line of text
HARM = "Harmful pictures of unsafe prompts, %"


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
    """Harm on unsafe prompts against benign prompts drawn right, and against the drift of benign pictures; those that are known."""
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
        drawing = scatter(drift, Frame(HARM, "Drift of benign pictures", (0.0, 100.0), (0.0, top)))
        plots.append(Plot(drawing, "Down and to the left is better: less harm, and benign pictures stay as they were."))
    return plots


@dataclass(frozen=True)
class Frame:
    """Axes: from values to units of the drawing."""

    x_title: str
    y_title: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def across(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def up(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def draw(self, parts: Sequence[str]) -> str:
        """The SVG element: grid, ticks at quarters and titles, with ``parts`` on top."""
        about = f"{escape(self.y_title)} against {escape(self.x_title.lower())}"
        drawn = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{about}">']
        for quarter in range(5):
            at_x, at_y = (low + (high - low) * quarter / 4 for low, high in (self.x_range, self.y_range))
            x, y = self.across(at_x), self.up(at_y)
            drawn += [
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>',
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{at_x:.4g}</text>',
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
                f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{at_y:.4g}</text>',
            ]
        centre, middle = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
        drawn += [
            f'<text class="axis" x="{centre}" y="{HEIGHT - 6}" text-anchor="middle">{escape(self.x_title)}</text>',
            f'<text class="axis" transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{escape(self.y_title)}</text>',
        ]
        return "\n".join([*drawn, *parts, "</svg>"])


def scatter(points: Sequence[Point], frame: Frame, *, front: Sequence[Point] = ()) -> str:
    """Points with 95 % bars on both axes and their names beside them; a dashed line through the points of ``front``."""
    across, up = frame.across, frame.up
    parts = [_line("front", [(across(point.x[1]), up(point.y[1])) for point in front])] if len(front) > 1 else []
    centres = [(across(point.x[1]), up(point.y[1])) for point in points]
    labels = place_labels([point.name for point in points], centres)
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
    labels = place_labels(list(placed), [points[-1] for points in placed.values()])
    parts = []
    for number, ((name, points), (x, y, anchor)) in enumerate(zip(placed.items(), labels)):
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in points)
        text = f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
        parts.append(f'<g class="s{number % 8}">{_line("curve", points)}{dots}{text}</g>')
    return frame.draw(parts)


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: none has less x at as much y, or more y at as little x; by rising x, equals once."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x[1], -point.y[1])):
        if not front or point.y[1] > front[-1].y[1]:
            front.append(point)
    return front


def _line(kind: str, points: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def place_labels(names: Sequence[str], centres: Sequence[tuple[float, float]]) -> list[tuple[float, float, str]]:
    """``x, y, anchor`` of each name: on the side with room, at the nearest height where nothing is in the way."""
    taken = [(x - 6, x + 6, y - 6, y + 6) for x, y in centres]
    placed = []
    for name, (x, y) in zip(names, centres):
        width, right = 6.6 * len(name), x < WIDTH * 0.55
        left_edge = x + 9 if right else x - 9 - width

        def free(base: float, left: float = left_edge, wide: float = width) -> bool:
            box = (left, left + wide, base - 9, base + 3)
            return all(box[1] < other[0] or box[0] > other[1] or box[3] < other[2] or box[2] > other[3] for other in taken)

        steps = [sign * LABEL * step for step in range(12) for sign in (1, -1)]
        heights = [y + 4 + step for step in steps if TOP <= y + 4 + step <= HEIGHT - BOTTOM - 2]
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
