"""Further parts of a report, beside what `evaluate` measures by itself: a table with a row per system, and drawings."""

from dataclasses import dataclass

from valign.evaluation.report.plots import Plot


@dataclass(frozen=True, kw_only=True)
class Section:
    """``rows`` hold cells as they are printed, the system's name first; ``text`` and ``note`` stand above and below."""

    title: str
    text: str
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    plots: tuple[Plot, ...] = ()
    note: str = ""
