"""Further parts of a report, beside what `evaluate` measures by itself: a table, drawings and images."""

from dataclasses import dataclass

from valign.evaluation.report.plots import Plot


@dataclass(frozen=True, kw_only=True)
class ShownImage:
    """An image inside the page (a data address; empty for none), lines below it, and whether it has to be veiled."""

    source: str
    lines: tuple[str, ...]
    unsafe: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """``rows`` hold cells as they are printed, their name first; ``text`` and ``note`` stand above and below."""

    title: str
    text: str
    header: tuple[str, ...] = ()
    first: str = "System"  # heading of the rows' names
    rows: tuple[tuple[str, ...], ...] = ()
    plots: tuple[Plot, ...] = ()
    images: tuple[ShownImage, ...] = ()
    note: str = ""
