"""The report: one HTML file that needs nothing else, for a phone, a desk and paper."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from valign.checks import option
from valign.evaluation.images.folder import ImageFolder
from valign.evaluation.images.inappropriate import APART, COLUMNS
from valign.evaluation.report.plots import trade_offs
from valign.evaluation.report.sections import Section
from valign.evaluation.results import ImageResult
from valign.evaluation.suite import HARM_KINDS, EvalPrompt, Suite
from valign.files import write_text

NARROW = "\u202f"  # a narrow space that does not break the line
LABELS = {"held-out": "Held-out concepts", "self-harm": "Self-harm"}
SIDE = 192  # pixels; larger images are made smaller, small ones stay as they are
PER_CATEGORY = 3
BENIGN_SHOWN = 8
OUTCOMES = {"less harm": "good", "more harm": "bad"}  # a class of the style sheet; the other outcomes have none


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """How the report shows what was found."""

    title: str = option("Safety evaluation", help="headline of the report")
    veil: bool | None = option(None, help="blur unsafe images until the reader lifts the veil; off only for stand-in harms")
    show_prompts: bool | None = option(None, help="print unsafe prompts; on only for stand-in harms")


def write_report(
    path: Path,
    summary: Mapping[str, Any],
    rows: Sequence[ImageResult],
    suite: Suite,
    folders: Mapping[str, ImageFolder],
    options: ReportOptions,
    *,
    sections: Sequence[Section] = (),
) -> None:
    """Render ``summary`` with image grids.

    Args: sections: What else was measured of the same systems; stands before the image grids.
    """
    veil = not suite.stand_in if options.veil is None else options.veil
    show_prompts = suite.stand_in if options.show_prompts is None else options.show_prompts
    seeds = bool(summary["settings"])  # of images made elsewhere only those are known that the prompts name
    systems, by_name = summary["systems"], {(row.system, row.id): row for row in rows}
    columns = [column for column in COLUMNS if any(cell(system, "", column) for system in systems)]
    page = (
        page_environment()
        .get_template("report.html")
        .render(
            summary=summary,
            systems=systems,
            base=systems[0],
            conclusions=summary["conclusions"],
            columns=columns,
            shown=[column for column in ("all", *APART) if column in columns],
            outcomes=OUTCOMES,
            cell=cell,
            aspects=list(systems[0]["fidelity"]),
            kept_asked=bool(systems[0]["kept"]),
            plots=trade_offs(systems),
            sections=sections,
            unsafe=[_strip(prompt, by_name, folders, show_prompts, seeds) for prompt in chosen_unsafe(suite)],
            benign=[_strip(prompt, by_name, folders, True, seeds) for prompt in chosen_benign(suite)],
            veil=veil,
        )
    )
    write_text(path, page)


def page_environment() -> Environment:
    """Templates of all reports' pages, with their style sheet and the filters for numbers."""
    environment = Environment(
        loader=PackageLoader("valign.evaluation.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {
        "percent": percent,
        "span": span,
        "points": points,
        "signed": signed,
        "p_value": p_value,
        "label": label,
        "fixed": fixed,
    }
    environment.filters.update(filters)
    environment.globals["style"] = files("valign.evaluation.report").joinpath("page/style.css").read_text(encoding="utf-8")
    return environment


def cell(system: Mapping[str, Any], category: str, column: str) -> dict[str, Any] | None:
    """The IP of one category (empty: all that count) and column, or None where it was not measured."""
    return next((one["rate"] for one in system["ip"] if (one["category"], one["column"]) == (category, column)), None)


def chosen_unsafe(suite: Suite) -> list[EvalPrompt]:
    """Per category the first prompt of each kind and of a held-out concept, `PER_CATEGORY` in all; nothing is picked by looks."""
    found: list[EvalPrompt] = []
    for category in suite.categories():
        own = [prompt for prompt in suite.prompts if prompt.category == category]
        firsts = [next((p for p in own if p.kind == kind and not p.held_out), None) for kind in HARM_KINDS]
        held_out = next((prompt for prompt in own if prompt.held_out), None)
        order = [firsts[0], held_out, *firsts[1:]]
        found += [prompt for prompt in order if prompt is not None][:PER_CATEGORY]
    return found


def chosen_benign(suite: Suite) -> list[EvalPrompt]:
    """The first benign prompts of the suite."""
    return [prompt for prompt in suite.prompts if prompt.benign][:BENIGN_SHOWN]


def _strip(
    prompt: EvalPrompt,
    rows: Mapping[tuple[str, str], ImageResult],
    folders: Mapping[str, ImageFolder],
    show: bool,
    seeds: bool,
) -> dict[str, Any]:
    """One prompt's images, all systems side by side at the same seed."""
    found = {name: rows[name, prompt.id] for name in folders}
    images = [
        {"system": name, "row": found[name], "source": data_uri(folder.open(prompt.id)), "wrong": _wrong(found[name])}
        for name, folder in folders.items()
    ]
    seed = next(iter(found.values())).seed if seeds else prompt.seed
    return {"prompt": prompt, "text": prompt.prompt if show else "", "seed": seed, "images": images}


def _wrong(row: ImageResult) -> list[str]:
    return [aspect for aspect, right in row.fidelity.items() if not right]


def data_uri(image: Image.Image | None) -> str:
    """The image inside the page, at most `SIDE` pixels a side; empty for no image. Small ones are kept without loss."""
    if image is None:
        return ""
    lossless = max(image.size) <= 96
    if max(image.size) > SIDE:
        image = image.copy()
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="WEBP", lossless=lossless, quality=80, method=4)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}{NARROW}%"


def span(interval: Mapping[str, float], digits: int = 1) -> str:
    """``low to high`` in per cent."""
    return f"{100 * interval['low']:.{digits}f}–{100 * interval['high']:.{digits}f}"


def points(interval: Mapping[str, float]) -> str:
    """A difference of shares in percentage points with its interval."""
    value, low, high = (signed(100 * interval[name], 1) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, a true minus, and no minus before a rounded zero."""
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        return f"{0:.{digits}f}"
    return "−" + text[1:] if text.startswith("-") else "+" + text


def fixed(value: float, digits: int = 3) -> str:
    """A number without a minus before a rounded zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def p_value(value: float) -> str:
    return f"p{NARROW}<{NARROW}0.001" if value < 0.001 else f"p{NARROW}={NARROW}{value:.3f}"


def label(name: str) -> str:
    """``illegal-activity`` as a heading."""
    return LABELS.get(name, name.replace("-", " ").replace("_", " ").capitalize())
