"""``valign report``: the numbers of an evaluation for a spreadsheet, a notebook or a paper."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from valign.checks import UserError
from valign.cli.common import example, out, refuse_absent


@example("valign report runs/eval --csv numbers.csv --latex table.tex")
def command(
    folder: Annotated[Path, Argument(help="folder of an evaluation, or of a run that has one")],
    csv: Annotated[Path | None, Option(help="file to write: one row per system and measure")] = None,
    parquet: Annotated[Path | None, Option(help="the same as parquet")] = None,
    latex: Annotated[Path | None, Option(help="a booktabs table, one row per system")] = None,
    measure: Annotated[list[str], Option(help="column of the LaTeX table, as --csv names it; may be repeated")] = [],  # noqa: B006
    json: Annotated[bool, Option("--json", help="the rows as JSON, on stdout")] = False,
) -> None:
    """Write the numbers of an evaluation, with their intervals, for other programs."""
    if not (csv or parquet or latex or json):
        raise UserError("report must write something, got nothing to write. Name --csv, --parquet or --latex, or ask for --json.")
    if measure and not latex:
        raise UserError("--measure has no effect without --latex, whose columns it names. Leave it out.")
    refuse_absent(folder)
    from valign.evaluation.report.export import read_summary, rows_of, write_csv, write_latex, write_parquet

    rows = rows_of(read_summary(folder))
    if csv:
        write_csv(rows, csv)
    if parquet:
        write_parquet(rows, parquet)
    if latex:
        write_latex(rows, latex, measures=measure)
    if json:
        out.print_json(data=rows)
    for path in (csv, parquet, latex):
        if path:
            out.print(str(path), soft_wrap=True)
