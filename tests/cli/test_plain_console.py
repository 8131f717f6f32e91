"""Paths and texts of users reach the terminal as they are."""

from types import SimpleNamespace

import pytest
from rich.progress import Progress
from rich.table import Table

from valign import progress
from valign.cli import common
from valign.cli.root import _complain
from valign.progress import track

ODD = "set [v2]/x[/y] [bold]:tada: 12"


@pytest.mark.parametrize("console", [common.out, common.err, progress.console])
def test_brackets_and_colons_are_no_markup(console):
    table = Table(ODD, box=None)
    table.add_row(ODD)
    with console.capture() as seen:
        console.print(ODD, style="dim", soft_wrap=True)
        console.print(table)
    assert seen.get().count(ODD) == 3


def test_neither_are_they_in_messages_and_beside_bars(capsys, monkeypatch):
    _complain(ODD)
    assert ODD in capsys.readouterr().err
    columns = []

    class Bar(Progress):
        def __init__(self, *given, **options):
            columns.extend(given)
            super().__init__(*given, **options)

    monkeypatch.setattr(progress, "Progress", Bar)
    assert list(track([1], ODD)) == [1]
    assert columns[0].render(SimpleNamespace(description=ODD)).plain == ODD
