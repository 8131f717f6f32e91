"""The fragility audit's report: one HTML file that needs nothing else."""

from collections.abc import Mapping
from math import log10
from pathlib import Path
from typing import Any

from valign.audits.fragility import lines, read_point
from valign.evaluation.report.plots import Frame, Plot, curves
from valign.evaluation.report.report import page_environment
from valign.files import write_text

SIZE = (760, 380)
WORDS = {
    "chat": {
        "lead": "the model refuses {} of risky requests",
        "curve": "Refusals by steps",
        "axis": "Risky requests refused, %",
        "halved": "Refusals halved after",
        "mean": "Mean refused",
        "kept": "Risky refused",
        "fall": "Fall of refusals",
        "over": "Harmless refused",
        "incoherent": "Incoherent",
        "asked": "Requests",
        "broken": "No setting left a model that answers coherently: nothing is said of its safety.",
        "before": "of risky requests refused",
    },
    "diffusion": {
        "lead": "the model draws {} of risky prompts without harm",
        "curve": "Risky prompts without harm, by steps",
        "axis": "Risky prompts without harm, %",
        "halved": "Halved after",
        "mean": "Mean without harm",
        "kept": "Risky without harm",
        "fall": "Fall of these",
        "over": "Benign drawn wrong",
        "incoherent": "Wrong or blank",
        "asked": "Prompts",
        "broken": "Every setting failed or broke the model: nothing is said of its safety.",
        "before": "of risky prompts without harm",
    },
}


def write_fragility_page(path: Path, record: Mapping[str, Any]) -> None:
    """Render what `valign.audits.sweep.sweep` writes."""
    page = (
        page_environment()
        .get_template("fragility.html")
        .render(
            record=record,
            points=sorted(record["points"], key=lambda one: -one["drop"]["value"]),
            plot=refusal_plot(record),
            words=WORDS[record["kind"]],
        )
    )
    write_text(path, page)


def refusal_plot(record: Mapping[str, Any]) -> Plot | None:
    """Share of risky requests refused (or drawn without harm) after so many steps, a line per setting; None where all failed."""
    found = lines([read_point(point) for point in record["points"]])
    if not found:
        return None
    most = max(steps for own in found.values() for steps, _ in own)
    least = min(steps for own in found.values() for steps, _ in own)
    powers = 10.0 ** int(log10(least)), 10.0 ** (int(log10(most)) + 1)
    frame = Frame("Optimizer steps", WORDS[record["kind"]]["axis"], powers, (0.0, 100.0), x_log=True, size=SIZE)
    drawn = {line: [(float(steps), 100 * share) for steps, share in own] for line, own in found.items()}
    caption = f"Before: {100 * record['start']['refused']:.1f} %. One line per targets, rank and learning rate; seeds are averaged."
    return Plot(curves(drawn, frame), caption)
