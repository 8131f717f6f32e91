from dataclasses import replace

import pytest
from typer.testing import CliRunner

from valign.cli.bench import app
from valign.files import read_json
from valign.merging import MERGES
from valign.worlds import world


@pytest.mark.slow
def test_the_bench_measures_every_merge_and_baseline_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setitem(world("shapes").budgets, "small", replace(world("shapes").budgets["small"], pairs=8, steps=2))
    run = ["alignguard", "-o", str(tmp_path), "--budget", "small"]
    first = CliRunner().invoke(app, run)
    assert first.exit_code == 0, first.output
    summary = read_json(tmp_path / "evaluation" / "summary.json")
    names = {system["name"] for system in summary["systems"]}
    assert names == {"base", "negative-prompt", "joint", *MERGES, *(f"sld-{name}" for name in ("weak", "medium", "strong", "max"))}
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert CliRunner().invoke(app, run).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == written
