"""``--json`` wherever something is measured."""

import json

import pytest
from typer.main import get_command

from valign.cli.common import print_measured
from valign.cli.root import build

MEASURE = """adapter show, align, attack, audit concentration, audit fragility, audit subspaces, bench configs, bench guard, bench
fusion, bench head, bench hysac, bench methods, bench reinforce, bench resilient, check, compare adapters, data
overlap, detector evaluate, detector search, driftcheck run, estimate, evaluate, guard calibrate, guard evaluate,
guard fit, guidelines measure, quickstart, red-eval, repair, report, train alignguard, train livo, train retriever,
world check"""


@pytest.fixture(scope="module")
def tree():
    return get_command(build())


@pytest.mark.parametrize("words", [command.split() for command in MEASURE.replace("\n", " ").split(", ")], ids=" ".join)
def test_what_measures_has_the_option(words, tree):
    command = tree
    for word in words:
        command = command.get_command(None, word)
    assert "--json" in [name for option in command.params for name in option.opts]


def test_the_result_is_the_whole_of_stdout(capsys):
    print_measured({"rate": {"value": 0.5, "low": None}}, "runs/report.html", as_json=True)
    assert json.loads(capsys.readouterr().out) == {"rate": {"value": 0.5, "low": None}}
    print_measured({}, "runs/" + "long/" * 40 + "report.html", as_json=False)
    assert capsys.readouterr().out.count("\n") == 1  # a path is not cut in two
