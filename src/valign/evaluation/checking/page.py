"""The report of a check: one HTML file that needs nothing else."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from valign.evaluation.checking.decision import ALARM, CATEGORY, SAFE
from valign.evaluation.report.plots import Frame, Plot, Point, intervals
from valign.evaluation.report.report import label, page_environment, percent
from valign.files import write_text

COLOURS = {"safe": "good", "drifted": "bad", "undecided": "", "error": "bad"}
WORDS = {"safe": "below", "drifted": "above"}  # what an axis is against the limit
LINE = 46  # pixels of a row of the plot
SHOWN = 40  # answers that changed


def write_check_page(path: Path, result: Mapping[str, Any], changed: Sequence[Mapping[str, Any]], *, shown: bool) -> None:
    """Render what `valign.recipes.check_result.CheckResult.record` gave.

    Args:
        changed: Requests whose outcome changed, as the page lists them.
        shown: Whether their texts are in it.
    """
    page = (
        page_environment()
        .get_template("check.html")
        .render(
            result=result,
            decision=result["decision"],
            judge_text=judge_text(result["judge"]),
            plot=drift_plot(result["decision"]),
            changed=changed[:SHOWN],
            changed_in_all=len(changed),
            shown=shown,
            colours=COLOURS,
            words=WORDS,
            alarm=ALARM,
            category=CATEGORY,
            safe=SAFE,
        )
    )
    write_text(path, page)


def judge_text(card: Mapping[str, Any]) -> str:
    """What is known of the judge's error, in sentences."""
    told = []
    for name in ("harm", "refusals"):
        error = card[name]
        if error is None:
            told.append(f"its error about {name} was never measured")
        elif error["sensitivity"] == error["specificity"] == 1 and not error["positives"]:
            told.append(f"it makes no error about {name}")
        else:
            counts = f" (measured on {error['positives']} and {error['negatives']})" if error["positives"] else ""
            missed, false = (percent(1 - error[key]) for key in ("sensitivity", "specificity"))
            told.append(f"of {name} it misses {missed} and falsely sees {false}{counts}")
    return f"Judge {card['name']}: {'; '.join(told)}."


def drift_plot(decision: Mapping[str, Any]) -> Plot:
    """The rise of each question and category with its interval, and the limit."""
    categories = decision["categories"] if len(decision["categories"]) > 1 else ()
    named = [("Harm complied with", decision["harm"]), ("Harmless prompts refused", decision["refusals"])]
    named += [(f"Harm: {label(one['name'])}", one) for one in categories]
    points = []
    for name, one in named:
        low, value, high = (100 * one["drift"][key] for key in ("low", "value", "high"))
        points.append(Point(name, (low, value, high), (0.0, 0.0, 0.0)))
    limit = 100 * decision["limits"]["max_drift"]
    low = min(-limit, *(point.x[0] for point in points))
    high = max(2 * limit, *(point.x[2] for point in points))
    step = 5.0 if high - low <= 60 else 20.0
    frame = Frame(
        "Rise, percentage points",
        "",
        (max(-100.0, step * -ceil(-low / step)), min(100.0, step * ceil(high / step))),
        (0.0, 1.0),
        size=(760, 60 + LINE * len(points)),
    )
    return Plot(intervals(points, frame, limit=limit), "Dots and bars: the rise with its 95 % interval. Dashed: the limit.")
