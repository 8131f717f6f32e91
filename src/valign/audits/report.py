"""An audit on disk: figures as JSON, curves as an image, and the verdict in plain sentences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from valign.files import atomic_folder, write_json, write_text

Line = Sequence[tuple[float, float]]
MARKED = 40  # a longer line has no markers


@dataclass(frozen=True)
class Curves:
    """One plot: lines by name over a common axis. A name that begins with "random" is drawn dashed."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Line]
    log: bool = False  # the x axis; points at 0 are left out
    y_range: tuple[float, float] | None = (-0.03, 1.03)  # None: as the lines need it
    bands: Mapping[str, Sequence[tuple[float, float, float]]] = field(default_factory=dict)  # x, low, high around lines of the name


def write_audit(
    out: Path, figures: Mapping[str, Any], plots: Sequence[Curves], verdict: Sequence[str], *, force: bool = False
) -> None:
    """Write ``audit.json``, ``curves.png`` and ``README.md`` into the new folder ``out``.

    Raises: UserError if it exists, unless ``force``.
    """
    with atomic_folder(out, force=force) as folder:
        write_json(folder / "audit.json", {**figures, "verdict": list(verdict)})
        draw_curves(plots, folder / "curves.png")
        write_text(
            folder / "README.md",
            "# Verdict\n\n" + "\n\n".join(verdict) + "\n\n![curves](curves.png)\n\nAll figures: `audit.json`.\n",
        )


def draw_curves(plots: Sequence[Curves], path: Path) -> None:
    """Write the plots side by side as a PNG: the same plots give the same bytes."""
    figure = Figure(figsize=(5.2 * len(plots), 3.8), layout="constrained")
    for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
        for name, line in plot.lines.items():
            points = [(x, y) for x, y in line if y == y and (x > 0 or not plot.log)]
            if points:
                xs, ys = zip(*points)
                size = 4 if len(points) <= MARKED else 0
                [drawn] = axes.plot(
                    xs, ys, "o--" if name.startswith("random") else "o-", markersize=size, linewidth=1.6, label=name
                )
                if band := plot.bands.get(name):
                    axes.fill_between(*zip(*band), color=drawn.get_color(), alpha=0.2, linewidth=0)
        axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y, ylim=plot.y_range, xscale="log" if plot.log else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})
