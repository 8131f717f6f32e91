"""The report of attacks: one HTML file that needs nothing else, made of the sections that other reports have."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from valign.attacks.results import AttackResult
from valign.evaluation.images.inappropriate import COLUMNS
from valign.evaluation.report.plots import Frame, Plot, curves
from valign.evaluation.report.report import data_uri, label, p_value, page_environment, percent, points, span
from valign.evaluation.report.sections import Section, ShownImage
from valign.evaluation.suite import Suite
from valign.files import write_text
from valign.images import open_image

SHOWN = 24  # images that got through, at most
UNKNOWN = "not measured"


def write_attack_page(path: Path, summary: Mapping[str, Any], results: Sequence[AttackResult], suite: Suite, folder: Path) -> None:
    """Render the summary of `valign.attacks.runner.attack_systems`; images are veiled and prompts hidden unless all is stand-in."""
    page = (
        page_environment()
        .get_template("attack.html")
        .render(
            summary=summary,
            lead=headline(summary),
            sections=[*_tables(summary), *_got_through(results, suite, folder)],
            veil=not suite.stand_in,
        )
    )
    write_text(path, page)


def headline(summary: Mapping[str, Any]) -> str:
    """Per system the attack that succeeded most often, and why nothing follows from it, where that is so."""
    parts = []
    for system in summary["systems"]:
        own = [row for row in summary["rates"] if row["system"] == system["name"] and row["after"]]
        if own:
            worst = max(own, key=lambda row: row["after"]["share"]["value"])
            share = worst["after"]["share"]
            parts.append(f"{system['name']} {percent(share['value'])} ({span(share)}, by {worst['attack']})")
    if not parts:
        return "Nothing was measured."
    return f"Harm within the budget, by the attack that succeeded most often: {'; '.join(parts)}. {summary['blind']}".strip()


def table_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """System, attack, before, after, difference, of the harmless, bypassed, asked for, again, queries; as they are printed."""
    return [
        (
            row["system"],
            row["attack"],
            rate_text(row["before"]),
            rate_text(row["after"]),
            difference(row["after"]),
            rate_text(row["needed"]),
            rate_text(row["bypassed"]),
            rate_text(row["asked"]),
            rate_text(row["again"]),
            f"{row['spent']['queries']:.1f}",
        )
        for row in summary["rates"]
    ]


HEADER = (
    "Attack",
    "Harm before",
    "Harm after",
    "Difference",
    "Of the harmless",
    "Bypassed",
    "Asked category",
    "Again, new seed",
    "Queries",
)


LEGEND = (
    "Of the harmless: prompts whose unchanged image was harmless, which alone need an attack. Bypassed: a prompt reached the model "
    "as written and its image came back, harmful or not. Again: the found prompt with one fresh seed, of all prompts."
)
SPENT = ("Attack", "Queries", "Images", "Gradients", "Encodings", "Chats", "Guard calls", "Seconds", "How they ended")


def rate_text(rate: Mapping[str, Any] | None) -> str:
    """A share in per cent with its interval and count."""
    if rate is None:
        return UNKNOWN
    left = f", {rate['left_out']} not measured" if rate["left_out"] else ""
    return f"{percent(rate['share']['value'])} ({span(rate['share'])}; {rate['count']} of {rate['total']}{left})"


def difference(rate: Mapping[str, Any] | None) -> str:
    """In points, with its interval and the exact p-value of the paired test."""
    if rate is None or rate["versus"] is None:
        return "–"
    test = rate["versus"]["test"]
    return points(rate["versus"]["difference"]) + (f", {p_value(test['exact'])}" if test else "")


def _tables(summary: Mapping[str, Any]) -> list[Section]:
    rates = summary["rates"]
    columns = [name for name in COLUMNS if any(name in row["columns"] for row in rates)]
    categories = list(dict.fromkeys(name for row in rates for name in row["categories"]))
    found = [
        Section(
            title="Success before and after",
            text="Before: the unchanged prompt, one image. After: the attack, within its budget.",
            header=HEADER,
            rows=tuple(table_rows(summary)),
            note=LEGEND,
        ),
        _by(summary, "What got through, by kind of prompt", "columns", columns),
        _by(summary, "What got through, by category", "categories", categories),
        _budget_curves(summary),
        Section(
            title="What the attacks spent",
            text="Means per prompt; needless attacks stop after one query.",
            header=SPENT,
            rows=tuple(
                (row["system"], row["attack"], *(f"{value:.1f}" for value in row["spent"].values()), _counts(row["ended"]))
                for row in rates
            ),
            note="Images include those that an image check held back. Guard calls are on a copy that the attacker has.",
        ),
    ]
    if summary["transfer"]:
        rows = [(one["found_on"], one["attack"], one["system"], rate_text(one["rate"])) for one in summary["transfer"]]
        found.append(
            Section(
                title="Transfer",
                text="Prompts that succeeded on one system, sent once to another with a fresh seed. Nothing is searched there.",
                header=("Attack", "Tried on", "Harm"),
                first="Found on",
                rows=tuple(rows),
            )
        )
    if summary["benign"]:
        rows = [
            (name, *(f"{one[action]} of {one['prompts']}" for action in ("allow", "rewrite", "block")))
            for name, one in summary["benign"].items()
        ]
        found.append(
            Section(
                title="What the guard costs benign prompts",
                text="Benign prompts of the same suite.",
                header=("Left as they are", "Rewritten", "Blocked"),
                rows=tuple(rows),
            )
        )
    return found


def _by(summary: Mapping[str, Any], title: str, part: str, names: Sequence[str]) -> Section:
    rows = [
        (row["system"], row["attack"], *(rate_text(row[part][name]) if name in row[part] else "–" for name in names))
        for row in summary["rates"]
    ]
    note = "Concepts that were held out of training have a column of their own and are in no other." if part == "columns" else ""
    return Section(title=title, text="Harm within the budget.", header=("Attack", *map(label, names)), rows=tuple(rows), note=note)


def _budget_curves(summary: Mapping[str, Any]) -> Section:
    """One plot per attack: share of prompts that have succeeded against the number of queries, by system."""
    most = summary["settings"]["queries"]
    plots = []
    for attack in summary["attacks"]:
        own = [row for row in summary["rates"] if row["attack"] == attack]
        series = {row["system"]: [(float(i), 100 * share) for i, share in enumerate(row["curve"], start=1)] for row in own}
        drawing = curves(series, Frame("Queries", "Prompts with a harmful image, %", (0.0, float(most)), (0.0, 100.0)))
        plots.append(Plot(drawing, attack))
    return Section(title="Success over the budget", text="Query 1 is the unchanged prompt.", plots=tuple(plots))


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in found.items())


def _got_through(results: Sequence[AttackResult], suite: Suite, folder: Path) -> list[Section]:
    """The first images that got through, in the order of systems, attacks and prompts; those that needed no attack are left out."""
    won = [one for one in results if one.ended == "broken"]
    if not won:
        return []
    images = []
    for one in won[:SHOWN]:
        lines = [f"{one.system}, {one.attack}", f"{label(one.category)}, {one.kind}{', held out' if one.held_out else ''}"]
        lines += [one.prompt] if suite.stand_in else []
        images.append(ShownImage(source=data_uri(open_image(folder / one.image)), lines=tuple(lines), unsafe=True))
    text = f"The first {len(images)} of {len(won)} images that an attack found, in the order of the tables, not picked by looks."
    return [Section(title="What got through", text=text, images=tuple(images))]
