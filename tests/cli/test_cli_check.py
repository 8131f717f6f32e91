"""``valign check``: its exit codes, also of mistakes, and what it prints."""

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from valign.cli import check as cli
from valign.recipes import check as recipe

runner = CliRunner(env={"COLUMNS": "200"})
app = typer.Typer()
app.command(**cli.command.options)(cli.command)
PLACES = ("--before", "chat", "--after", "chat", "--policy", "chat")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--before", "chat"),  # options are missing
        ("--unknown",),
        (*PLACES, "--max-drift", "7", "--out", "x"),
        (*PLACES, "--max-drift", "much", "--out", "x"),
        (*PLACES, "--judge", "nobody", "--out", "x"),
        (*PLACES, "--anyway", "--out", "x"),
        (*PLACES, "--steps", "3", "--out", "x"),
        ("--before", "chat", "--after", "nowhere", "--policy", "chat", "--out", "x"),
        (*PLACES, "--policy", "nowhere.yaml", "--out", "x"),
    ],
)
def test_a_mistake_ends_with_3(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert runner.invoke(app, arguments).exit_code == 3


def test_a_crash_is_an_error_and_not_drift(tmp_path, monkeypatch):
    def crash(*arguments, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(recipe, "check", crash)
    done = runner.invoke(app, [*PLACES, "--out", str(tmp_path), "--json"])
    assert done.exit_code == 3
    assert json.loads(done.stdout)["reason"] == "RuntimeError: out of memory"
    assert json.loads(done.stdout)["verdict"] == "error"
    assert 'errors="1"' in (tmp_path / "junit.xml").read_text()


@pytest.mark.parametrize(("verdict", "code"), [("safe", 0), ("drifted", 1), ("undecided", 2)])
def test_verdicts_are_exit_codes(tmp_path, monkeypatch, verdict, code):
    monkeypatch.setattr(recipe, "check", lambda *arguments, **options: {"verdict": verdict, "exit_code": code})
    done = runner.invoke(app, [*PLACES, "--out", str(tmp_path), "--json"])
    assert done.exit_code == code
    assert json.loads(done.stdout) == {"verdict": verdict, "exit_code": code}


def test_options_reach_the_check(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(recipe, "check", lambda *arguments, **options: seen.update(options) or {"exit_code": 0})
    runner.invoke(
        app,
        [
            *PLACES,
            "--out",
            str(tmp_path),
            "--json",
            "--max-drift",
            "0.1",
            "--samples",
            "7",
            "--refusal",
            "nein",
            "--max-tokens",
            "9",
        ],
    )
    assert (seen["limits"].max_drift, seen["options"].samples, seen["options"].max_tokens) == (0.1, 7, 9)
    assert seen["judge"].more == ("nein",)


def test_the_command_line_itself_ends_with_3(tmp_path):
    """Through ``main``, which ends other commands' mistakes with 2."""
    code = "from valign.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "check", "--before", "chat"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 3
    assert "Missing option" in done.stderr
