import pytest
from typer.testing import CliRunner

from valign.cli.world import app
from valign.detectors.oracle import OracleDetector
from valign.files import read_json
from valign.interfaces import SamplingConfig
from valign.models.diffusion.loading import load_model
from valign.models.encoders.clip import ClipEncoder


@pytest.mark.slow
def test_one_command_builds_a_whole_world_and_does_nothing_the_second_time(tmp_path):
    out = tmp_path / "world"
    run = ["build", "shapes", "-o", str(out), "--share", "0.001"]
    first = CliRunner().invoke(app, run)
    assert first.exit_code == 0, first.output
    model = load_model(out / "model", device="cpu")
    (image,) = model.generate(["a red circle"], seeds=[0], sampling=SamplingConfig(steps=2))
    oracle, clip = OracleDetector(out / "oracle", domain=()), ClipEncoder(out / "clip")
    assert oracle.detect([image]).shape == (1, len(oracle.card.classes))
    assert clip.score([image], ["a red circle"]).shape == (1,)
    assert read_json(out / "run.json")["results"]["oracle"] == dict(oracle.config.measured)
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert CliRunner().invoke(app, run).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.*")} == written
