"""``valign doctor``."""

import json
from importlib.metadata import PackageNotFoundError

import pytest
from typer.testing import CliRunner

from valign.cli import doctor
from valign.cli.root import build

runner = CliRunner(env={"COLUMNS": "200"})


def test_a_good_installation():
    result = runner.invoke(build(), ["doctor", "--json"])
    found = {row["name"]: row for row in json.loads(result.stdout)}
    assert result.exit_code == 0, [row for row in found.values() if row["state"] == "missing"]
    assert found["torch"]["state"] == "ok"
    assert found["shapes pipeline"]["detail"].partition(" ")[0] != "0.0"
    assert {"python", "processor", "hub cache", "current folder", "nudenet [nudenet]"} <= set(found)


def test_what_is_needed_and_missing_fails(monkeypatch):
    def version(package: str) -> str:
        if package == "diffusers":
            raise PackageNotFoundError(package)
        return "0.0.1" if package == "peft" else original(package)

    original = doctor.version
    monkeypatch.setattr(doctor, "version", version)
    result = runner.invoke(build(), ["doctor"])
    assert result.exit_code == 1
    assert "Mend this first: diffusers, peft" in result.stdout
    assert "0.0.1; pip install 'peft" in " ".join(result.stdout.replace("│", " ").split())  # the cell may be wrapped


def test_a_folder_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert [finding.state for finding in doctor.folders()] == ["missing", "missing"]


def test_pipelines_in_the_cache_are_named(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (finding,) = doctor.cached_models()
    assert finding.state == "optional"
    snapshot = tmp_path / "models--someone--some-model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (finding,) = doctor.cached_models()
    assert (finding.state, finding.detail) == ("ok", "someone/some-model")


def test_own_detectors_are_listed_and_a_broken_one_stops_nothing(tmp_path, monkeypatch):
    from valign.detectors.importing import import_judge
    from valign.detectors.vision_judge import JudgeOptions
    from valign.policy import load_policy

    monkeypatch.setenv("VALIGN_DETECTORS", str(tmp_path))
    (finding,) = doctor.own_detectors()
    assert (finding.state, "none in" in finding.detail) == ("optional", True)
    import_judge(tmp_path / "judge", load_policy("default"), (), JudgeOptions())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "detector.json").write_text("{}")
    (finding,) = doctor.own_detectors()
    assert finding.state == "ok"
    assert "judge (vision-judge)" in finding.detail
    assert "broken: " in finding.detail
