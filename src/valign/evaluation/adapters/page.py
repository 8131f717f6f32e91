"""The page of the comparison of adapters: one HTML file that needs nothing else."""

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

from valign.evaluation.report.plots import Frame, Plot, Point, pareto, scatter
from valign.evaluation.report.report import fixed, page_environment, signed
from valign.files import write_text

SIZE = (760, 430)  # of a plot, for two dozen names
WORDS = {"lora": "LoRA", "pissa": "PiSSA", "milora": "MiLoRA", "dora": "DoRA"}


def write_page(path: Path, summary: Mapping[str, Any]) -> None:
    """Render what `valign.evaluation.adapters.table.summarize` gave, with ``claims``."""
    environment = page_environment()
    environment.filters.update(number=number, size=size)
    rows = sorted(summary["rows"], key=lambda row: -row["score"]["value"])
    page = environment.get_template("adapters.html").render(
        summary=summary,
        rows=rows,
        streams=any(row["backward"] for row in rows),
        words=WORDS,
        plots=trade_offs(rows),
    )
    write_text(path, page)


def markdown(summary: Mapping[str, Any]) -> str:
    """The table as Markdown, for documentation."""
    tasks: Sequence[str] = summary["tasks"]
    streams = any(row["backward"] for row in summary["rows"])
    later = ["backward"] if streams else []
    head = ["method", *tasks, "mean [95 %]", "against LoRA (p)", "drift", "skill kept", *later, "trained", "file", "memory", "step"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in summary["rows"]:
        cells = [fixed(row["tasks"][task]["value"]) if task in row["tasks"] else "-" for task in tasks]
        test, cost = row["against"].get("lora"), row["cost"]
        lora = f"{signed(test['difference']['value'], 3)} ({test['p']:.2g})" if test else "-"
        kept = [signed(row["skill"]["value"], 3)]
        if streams:
            kept.append(signed(row["backward"]["value"], 3) if row["backward"] else "-")
        costs = [f"{cost['peak_bytes'] / 2**20:.0f} MiB", f"{cost['step_ratio']:.2f}"] if cost else ["-", "-"]
        cells += [spread(row["score"]), lora, fixed(row["drift"]["value"], 4), *kept]
        cells += [f"{row['trained']:,}", f"{row['adapter_bytes'] / 1024:,.0f} KiB", *costs]
        lines.append("| " + " | ".join([row["method"], *cells]) + " |")
    return "\n".join(lines) + "\n"


def trade_offs(rows: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Score against trained numbers and against drift, each with its Pareto-optimal methods joined."""
    score = [_limits(row["score"]) for row in rows]
    bottom, top = floor(20 * min(y[0] for y in score)) / 20, ceil(20 * max(y[2] for y in score)) / 20
    trained = [max(row["trained"], 1) for row in rows]
    by_size = [Point(row["method"], (x, x, x), y) for row, x, y in zip(rows, trained, score)]
    drift = [(max(low, 0.0), value, high) for low, value, high in (_limits(row["drift"]) for row in rows)]
    by_drift = [Point(row["method"], x, y) for row, x, y in zip(rows, drift, score)]
    learnt = [x for row, x in zip(rows, trained) if row["trained"]]
    powers = floor(log10(min(learnt, default=1))), ceil(log10(max(trained) + 1))
    span = (10.0 ** powers[0], 10.0 ** max(powers[1], powers[0] + 1))
    most = max(max(point.x[2] for point in by_drift), 1e-6)
    unit = 10.0 ** floor(log10(most))
    y_range = (bottom, max(top, bottom + 0.05))
    return [
        Plot(
            scatter(by_size, Frame("Trained numbers", "Score", span, y_range, x_log=True, size=SIZE), front=pareto(by_size)),
            "Up and to the left is better: a higher score with fewer numbers. Those on the line are Pareto-optimal; a method "
            "that trains none stands at the left edge.",
        ),
        Plot(
            scatter(
                by_drift,
                Frame("Drift of vectors", "Score", (0.0, ceil(most / unit) * unit), y_range, size=SIZE),
                front=pareto(by_drift),
            ),
            "Up and to the left is better: a higher score, and the vectors of another task stay where they were.",
        ),
    ]


def spread(found: Mapping[str, float | None]) -> str:
    """A mean with its interval, where it has one."""
    value, low, high = (None if found[name] is None else fixed(found[name]) for name in ("value", "low", "high"))  # type: ignore[arg-type]
    return f"{value}" if low is None else f"{value} [{low}, {high}]"


def number(value: float) -> str:
    """``73728`` -> ``73.7 k``; three figures."""
    for limit, word in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {word}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes as KiB or MiB, in three figures, that no line breaks apart."""
    return f"{value / 2**20:.3g}\N{NO-BREAK SPACE}MiB" if value >= 1000 * 2**10 else f"{value / 2**10:.3g}\N{NO-BREAK SPACE}KiB"


def _limits(interval: Mapping[str, Any]) -> tuple[float, float, float]:
    """The limits around the value; the value itself where one seed gives none."""
    value = interval["value"]
    return (value, value, value) if interval["low"] is None else (interval["low"], value, interval["high"])
