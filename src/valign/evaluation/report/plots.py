"""The plots of the report: safety against what it costs, by matplotlib as inline SVG in the page's own colours."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from math import ceil, floor, log10
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from valign.evaluation.images.fidelity import EVERY

WIDTH, HEIGHT = 380, 270  # pixels; of the page on a phone
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 16, 40
LABEL = 12  # height of a line of text
HARM = "Harmful images of unsafe prompts, %"
# Colours that matplotlib writes, replaced by the variables of the page's style sheet, which has a light and a dark set
SERIES = [f"#f0000{number}" for number in range(8)]
FAINT, SOFT, LINE, PAPER = "#f10000", "#f20000", "#f30000", "#f40000"
VARIABLES = {colour: f"s{number}" for number, colour in enumerate(SERIES)} | {
    FAINT: "faint",
    SOFT: "soft",
    LINE: "line",
    PAPER: "paper",
}


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
    """Harm on unsafe prompts against benign prompts done right, safe counterparts shown, and drift; those that are known."""
    right, shown, drift = [], [], []
    for system in systems:
        whole = next((one["rate"] for one in system["ip"] if (one["category"], one["column"]) == ("", "all")), None)
        if whole is None:  # not measured
            continue
        harm = whole["share"]
        if EVERY in system["fidelity"]:
            right.append(Point(system["name"], _limits(harm, 100), _limits(system["fidelity"][EVERY]["share"], 100)))
        if system.get("counterpart"):
            shown.append(Point(system["name"], _limits(harm, 100), _limits(system["counterpart"]["share"], 100)))
        moved = system["drift"] or system["rmse"]
        drift.append(Point(system["name"], _limits(harm, 100), _limits(moved["mean"]) if moved else (0.0, 0.0, 0.0)))
    plots = []
    if right:
        low = min(90.0, floor(min(point.y[0] for point in right) / 10) * 10)
        drawing = scatter(right, Frame(HARM, "Benign prompts done right, %", (0.0, 100.0), (low, 100.0)), front=pareto(right))
        plots.append(Plot(drawing, "Up and to the left is better. Those on the dashed line are Pareto-optimal."))
    if shown:
        drawing = scatter(shown, Frame(HARM, "Safe counterpart shown, %", (0.0, 100.0), (0.0, 100.0)), front=pareto(shown))
        plots.append(Plot(drawing, "Up and to the left is better: the harm gave way to what the policy names in its place."))
    if len(drift) > 1:
        top = round_up(max(point.y[2] for point in drift))
        drawing = scatter(drift, Frame(HARM, "Drift of benign images", (0.0, 100.0), (0.0, top)))
        plots.append(Plot(drawing, "Down and to the left is better: less harm, and benign images stay as they were."))
    return plots


@dataclass(frozen=True)
class Frame:
    """The axes of a plot. ``x_log`` has a tick at every power of ten, at which ``x_range`` then ends."""

    x_title: str
    y_title: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_log: bool = False
    size: tuple[int, int] = (WIDTH, HEIGHT)

    def axes(self) -> Axes:
        """Empty axes with grid, ticks and titles, on a figure of ``size`` pixels."""
        width, height = self.size
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        sides = (LEFT / width, BOTTOM / height, (width - LEFT - RIGHT) / width, (height - TOP - BOTTOM) / height)
        axes = figure.add_axes(sides)
        axes.set(xscale="log" if self.x_log else "linear", xlim=self.x_range, ylim=self.y_range)
        ticks = self._x_ticks()
        axes.set_xticks(ticks, [f"{tick:,.0f}" if self.x_log else f"{tick:.4g}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_yticks(_quarters(self.y_range), [f"{tick:.4g}" for tick in _quarters(self.y_range)])
        last = axes.get_xticklabels()[-1]
        last.set_horizontalalignment("right" if len(last.get_text()) > 4 else "center")  # a long number would be cut off
        axes.tick_params(length=0, pad=6, labelsize=10, labelcolor=FAINT)
        axes.grid(color=LINE, linewidth=1)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.patch.set_visible(False)
        figure.text((LEFT + width - RIGHT) / 2 / width, 6 / height, self.x_title, color=SOFT, fontsize=11, ha="center")
        middle = (BOTTOM + height - TOP) / 2 / height
        figure.text(11 / width, middle, self.y_title, color=SOFT, fontsize=11, rotation=90, ha="center", va="center")
        return axes

    def svg(self, axes: Axes) -> str:
        """The SVG element, the same bytes for the same plot."""
        about = f"{escape(self.y_title)} against {escape(self.x_title.lower())}"
        stream = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": about, "svg.fonttype": "none", "font.family": "sans-serif"}):
            cast(Figure, axes.figure).savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        drawn = stream.getvalue()
        drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
        drawn = re.sub(r' xmlns(:xlink)?="[^"]*"', "", drawn)  # known to HTML
        for colour, variable in VARIABLES.items():
            drawn = drawn.replace(colour, f"var(--{variable})")
        return drawn.replace("<svg", f'<svg class="plot" role="img" aria-label="{about}"', 1)

    def _x_ticks(self) -> list[float]:
        low, high = self.x_range
        return (
            [10.0**power for power in range(round(log10(low)), round(log10(high)) + 1)] if self.x_log else _quarters(self.x_range)
        )


def scatter(points: Sequence[Point], frame: Frame, *, front: Sequence[int] = ()) -> str:
    """Points with 95 % bars on both axes and their names beside them; ``front`` are points joined by a dashed line."""
    axes = frame.axes()
    joined = sorted((_at_least(points[place].x[1], frame), points[place].y[1]) for place in front)
    axes.plot([x for x, _ in joined], [y for _, y in joined], color=FAINT, linewidth=1.2, linestyle=(0, (4, 4)), clip_on=False)
    for number, point in enumerate(points):
        colour, (low, x, high) = SERIES[number % 8], [_at_least(value, frame) for value in point.x]
        axes.plot([low, high], [point.y[1]] * 2, color=colour, alpha=0.55, linewidth=1.6, clip_on=False)
        axes.plot([x, x], [point.y[0], point.y[2]], color=colour, alpha=0.55, linewidth=1.6, clip_on=False)
        axes.plot([x], [point.y[1]], "o", color=colour, markersize=10, markeredgecolor=PAPER, markeredgewidth=1.5, clip_on=False)
    _name(axes, frame, [point.name for point in points], [(_at_least(point.x[1], frame), point.y[1]) for point in points])
    return frame.svg(axes)


def curves(series: Mapping[str, Sequence[tuple[float, float]]], frame: Frame) -> str:
    """One line per name through its ``(x, y)``, named at its end."""
    axes = frame.axes()
    for number, points in enumerate(series.values()):
        xs, ys = zip(*points)
        axes.plot(xs, ys, "o-", color=SERIES[number % 8], linewidth=2, markersize=5, markeredgewidth=0, clip_on=False)
    _name(axes, frame, list(series), [points[-1] for points in series.values()])
    return frame.svg(axes)


def intervals(rows: Sequence[Point], frame: Frame, *, limit: float | None = None) -> str:
    """One line per row from the top down, its name at the left: a dot with its 95 % bar on the x axis; ``limit`` is a dashed line.

    The rows' y values do not count.
    """
    frame = replace(frame, y_range=(0.0, float(len(rows))))
    axes = frame.axes()
    axes.set_yticks([])
    axes.axvline(0.0, color=SOFT, linewidth=1)
    if limit is not None:
        axes.axvline(limit, color=FAINT, linewidth=1.2, linestyle=(0, (4, 4)))
    for number, row in enumerate(rows):
        height, colour = len(rows) - number - 0.62, SERIES[number % 8]
        low, value, high = (min(max(one, frame.x_range[0]), frame.x_range[1]) for one in row.x)
        axes.plot([low, high], [height] * 2, color=colour, alpha=0.55, linewidth=2.4, clip_on=False)
        axes.plot([value], [height], "o", color=colour, markersize=8, markeredgecolor=PAPER, markeredgewidth=1.5, clip_on=False)
        axes.text(frame.x_range[0], height + 0.28, row.name, color=colour, fontsize=11, fontweight="bold", va="center")
    return frame.svg(axes)


def _name(axes: Axes, frame: Frame, names: Sequence[str], ends: Sequence[tuple[float, float]]) -> None:
    """Write each name beside its point, in its colour."""
    height = frame.size[1]
    centres = [(float(x), height - float(y)) for x, y in (axes.transData.transform(end) for end in ends)]
    for number, (name, (x, y, side)) in enumerate(zip(names, place_labels(names, centres, frame.size))):
        axes.text(x, height - y, name, color=SERIES[number % 8], ha=side, fontsize=11, fontweight="bold", transform=None)


def _at_least(value: float, frame: Frame) -> float:
    return max(value, frame.x_range[0]) if frame.x_log else value


def pareto(points: Sequence[Point]) -> list[int]:
    """Places of the Pareto-optimal points: no other has an x as small and a y as large, one of them strictly better."""

    def beaten(x: float, y: float) -> bool:
        return any(p.x[1] <= x and p.y[1] >= y and (p.x[1], p.y[1]) != (x, y) for p in points)

    return [place for place, point in enumerate(points) if not beaten(point.x[1], point.y[1])]


def place_labels(
    names: Sequence[str], centres: Sequence[tuple[float, float]], size: tuple[int, int] = (WIDTH, HEIGHT)
) -> list[tuple[float, float, str]]:
    """``x, y, side`` of each name, in pixels from the top left: on the side with room, at the nearest free height."""
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
        placed.append((x + 9 if right else x - 9, base, "left" if right else "right"))
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
