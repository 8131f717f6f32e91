"""Numbers of a summary as tables: every number once, none that was not measured."""

import csv
import json

import pyarrow.parquet as pq
import pytest

from valign.checks import UserError
from valign.evaluation.report.export import read_summary, rows_of, write_csv, write_latex, write_parquet

RATE = {"share": {"value": 0.25, "low": 0.1, "high": 0.4}, "corrected": None}
SUMMARY = {
    "systems": [
        {"name": "base", "description": "-", "ip": [{"category": "", "column": "all", "rate": RATE}], "drift": None},
        {"name": "our_1", "description": "-", "ip": [{"category": "", "column": "all", "rate": RATE}], "seconds_per_image": 2},
    ]
}
HARM = "ip.every category/all.rate.share"


def test_every_number_has_a_row_and_nothing_else_has():
    assert rows_of(SUMMARY) == [
        {"system": "base", "measure": HARM, "value": 0.25, "low": 0.1, "high": 0.4},
        {"system": "our_1", "measure": HARM, "value": 0.25, "low": 0.1, "high": 0.4},
        {"system": "our_1", "measure": "seconds_per_image", "value": 2.0, "low": None, "high": None},
    ]


def test_files_hold_the_rows(tmp_path):
    rows = rows_of(SUMMARY)
    write_csv(rows, tmp_path / "a.csv")
    write_parquet(rows, tmp_path / "a.parquet")
    write_latex(rows, tmp_path / "a.tex")
    with (tmp_path / "a.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read[2] == {"system": "our_1", "measure": "seconds_per_image", "value": "2.0", "low": "", "high": ""}
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == rows
    table = (tmp_path / "a.tex").read_text()
    assert r"our\_1 & 0.250 [0.100, 0.400] \\" in table
    assert table.startswith(r"\begin{tabular}{lr}")
    with pytest.raises(UserError, match=r"--measure must be one of the summary's, got fid\..* Known: ip\.every"):
        write_latex(rows, tmp_path / "b.tex", measures=["fid"])


def test_a_run_without_an_evaluation_is_refused(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "summary.json").write_text(json.dumps(SUMMARY))
    assert read_summary(tmp_path) == SUMMARY
    with pytest.raises(UserError, match=r"must hold a summary\.json of `valign evaluate`, got none"):
        read_summary(tmp_path / "nothing")
