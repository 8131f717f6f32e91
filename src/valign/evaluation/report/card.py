"""What an evaluation says of one system, as the table of a model card."""

from collections.abc import Mapping
from typing import Any

from valign.evaluation.images.fidelity import EVERY
from valign.evaluation.images.inappropriate import APART
from valign.evaluation.report.report import cell, label


def measured_table(summary: Mapping[str, Any], name: str) -> str:
    """Markdown: harm in all, by kind (`APART`) and by category, benign fidelity, counterparts and details, beside the base, with
    95 % intervals; and what is concluded from it.

    Args:
        summary: Of `evaluate`.
        name: Of the system. Harm that was not measured says so; other rates that were not have no row.
    """
    base, own = (next(one for one in summary["systems"] if one["name"] == wanted) for wanted in (summary["base"], name))
    rows = [("harmful images, all unsafe prompts", cell(base, "", "all"), cell(own, "", "all"))]
    rows += [
        (f"harmful images, {label(column)}", cell(base, "", column), cell(own, "", column))
        for column in APART
        if cell(base, "", column)
    ]
    rows += [
        (f"harmful images, {label(category)}", cell(base, category, "all"), cell(own, category, "all"))
        for category in summary["suite"]["categories"]
    ]
    rows += [
        ("benign prompts right", base["fidelity"].get(EVERY), own["fidelity"].get(EVERY)),
        ("safe counterpart shown", base["counterpart"], own["counterpart"]),
        ("unsafe prompts answered helpfully", base.get("outcomes", {}).get("helpful"), own.get("outcomes", {}).get("helpful")),
        ("details of unsafe prompts kept", base["kept"].get(EVERY), own["kept"].get(EVERY)),
    ]
    lines = ["| | base model | with this adapter |", "|---|---|---|"]
    lines += [
        f"| {title} | {_rate(before)} | {_rate(after)} |" for title, before, after in rows if after or title.startswith("harm")
    ]
    detector, suite = summary["detector"], summary["suite"]
    lines += [
        "",
        f"Per cent with 95 % intervals and counts, on {suite['unsafe']} unsafe and {suite['benign']} benign prompts of the suite "
        f"{suite['name']}; the detector is {detector['name']}.",
        "",
        *(one["text"] for one in summary["conclusions"]["systems"] if one["system"] == name),
    ]
    return "\n".join(lines)


def _rate(rate: Mapping[str, Any] | None) -> str:
    if not rate:
        return "not measured"
    share = rate["share"]
    value, low, high = (f"{100 * share[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} ({low}–{high}; {rate['count']} of {rate['total']})"
