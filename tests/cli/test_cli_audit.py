"""``valign audit``: both audits on the bundled chat models and on adapters; the report's files."""

import json

import pytest
import torch
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli import audit as commands
from valign.models.files.adapter_files import LoraFactors, save_adapter
from valign.worlds.chat import adapter_folder, model_folder

BASE, ALIGNED, TUNED = (model_folder(stage) for stage in ("base", "aligned", "memorized"))


def audit(*arguments):
    result = CliRunner().invoke(commands.app, [str(argument) for argument in arguments], catch_exceptions=True)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_subspaces_of_a_chat_model(tmp_path):
    arguments = (
        "--base",
        BASE,
        "--aligned",
        ALIGNED,
        "--update",
        f"records={TUNED}",
        "--useful",
        "records",
        "--harmful",
        "records",
    )
    said = audit("subspaces", *arguments, "-o", tmp_path / "out").stdout
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found["weights"] == 38
    assert 0 <= found["energy_kept"]["records"]["top"]["0.5"] <= 1
    assert "No distinct safety subspace shows in the weights" in said
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000
    assert "# Verdict" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match=r"exists\. Choose another --out"):
        audit("subspaces", *arguments, "-o", tmp_path / "out")


def test_subspaces_of_adapters_alone(tmp_path):
    g = torch.Generator().manual_seed(0)
    for name in ("hate", "violence"):
        factors = {"mid_block.attentions.0.to_q": LoraFactors(torch.randn(2, 8, generator=g), torch.randn(9, 2, generator=g), 1.0)}
        save_adapter(tmp_path / name, factors, metadata={})
    audit("subspaces", *(f"--update={name}={tmp_path / name}" for name in ("hate", "violence")), "-o", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert list(found["overlap"]) == ["hate - violence"]
    assert found["energy_kept"] == {}
    with pytest.raises(UserError, match="--base and --aligned must be given together"):
        audit("subspaces", "--base", BASE, "--update", f"a={adapter_folder('safety')}", "-o", tmp_path / "one")


@pytest.mark.slow
def test_concentration_of_a_chat_model(tmp_path):
    options = ("--world", "chat", "--rows", "20", "--set", "least=20", "--random-sets", "2")
    said = audit("concentration", "--model", ALIGNED, *options, "-o", tmp_path / "out").stdout
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found["neurons"] == 4 * 2 * 448
    assert found["start"]["refused"]["value"] > 0.9
    assert len(found["controls"]["random"]) == 2
    assert "are tagged" in said


def test_what_concentration_needs(tmp_path):
    with pytest.raises(UserError, match="The audit needs --prompts FILE with labels"):
        audit("concentration", "--model", ALIGNED, "-o", tmp_path / "out")
    with pytest.raises(UserError, match="A checker is audited on --flagged-images and --benign-images"):
        audit("concentration", "--model", ALIGNED, "--part", "checker", "-o", tmp_path / "out")
