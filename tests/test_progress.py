"""Progress: a line a minute where no bar is drawn, and silence where it was asked for."""

import logging
import os

import pytest
from typer.testing import CliRunner

from valign import progress
from valign.cli.common import err
from valign.cli.root import COMMANDS, build
from valign.progress import progress_line, track


def test_off_a_terminal_a_line_a_minute_says_phase_step_rate_and_time_left(monkeypatch, capsys):
    monkeypatch.setenv("VALIGN_PROGRESS", "1")
    clock = iter(range(0, 10_000, 25))  # each look at the clock is 25 seconds after the one before
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    assert list(track(range(6), "training", done=4)) == list(range(6))
    assert capsys.readouterr().err.splitlines() == [
        "training: 7 of 10, 25 s each, 0:01:15 left",
        "training: 10 of 10, 25 s each, 0:00:00 left",
    ]
    monkeypatch.setenv("VALIGN_PROGRESS", "0")
    assert list(track(range(6), "training")) == list(range(6))
    assert capsys.readouterr().err == ""


def test_a_line_without_a_total_and_a_quick_one():
    assert progress_line("reading", 30, None, rate=0.5) == "reading: 30, 2 s each"
    assert progress_line("encoding", 30, 60, rate=10.0) == "encoding: 30 of 60, 10 per second, 0:00:03 left"


@pytest.fixture
def restored(monkeypatch):
    monkeypatch.setenv("VALIGN_PROGRESS", "1")
    yield
    err.quiet = False


def test_quiet_leaves_results_and_errors(restored):
    found = CliRunner().invoke(build(), ["methods", "--quiet"])
    assert found.exit_code == 0
    assert found.stdout
    assert err.quiet
    assert os.environ["VALIGN_PROGRESS"] == "0"
    CliRunner().invoke(build(), ["methods"])
    assert not err.quiet


def test_every_command_takes_both_options(restored, monkeypatch):
    asked = []
    monkeypatch.setattr(logging, "basicConfig", lambda **options: asked.append(options["level"]))
    for command in (["methods"], ["policy", "check", "default"], ["adapter", "show", "nowhere"]):
        CliRunner().invoke(build(), [*command, "-v"])
    assert asked == [logging.INFO] * 3
    pages = [CliRunner().invoke(build(), [name, "--help"]).stdout for name in COMMANDS]
    assert all("--quiet" in page or "Commands" in page for page in pages)
