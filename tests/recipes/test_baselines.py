import json

import pytest
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli.baseline import app
from valign.models.diffusion.loading import load_model
from valign.models.files.adapter_files import open_adapter
from valign.policy import load_policy
from valign.recipes.baselines import concept_edit, make_uce, policy_concepts


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout.replace("\n", "")


def test_concepts_are_the_policys_without_what_is_held_out():
    policy = load_policy("shapes")
    names, safe = policy_concepts(policy)
    assert len(names) == len(safe) == 14
    assert ("flame", "flower") in zip(names, safe, strict=True)
    assert "comet" not in names  # held out
    assert policy_concepts(policy, ["violence"])[0] == ("flame", "blast")
    with pytest.raises(UserError, match="category must be one of"):
        policy_concepts(policy, ["rays"])


def test_the_guide_is_nothing_or_the_safe_counterpart():
    policy = load_policy("shapes")
    assert concept_edit(policy, ["violence"]).guides == ("",)
    edit = concept_edit(policy, ["violence"], guide="safe", preserve=("tree",))
    assert (edit.guides, edit.preserve) == (("flower", "flower"), ("tree",))


def test_uce_is_made_once(tiny_sd, tmp_path, monkeypatch):
    model, edit = load_model(tiny_sd, device="cpu"), concept_edit(load_policy("shapes"))
    adapter = make_uce(model, edit, tmp_path)
    results = json.loads((tmp_path / "run.json").read_text())["results"]
    assert results["rank"] == 14
    assert results["parameters"] == sum(lora.down.numel() + lora.up.numel() for _, lora in open_adapter(adapter).items())
    monkeypatch.setattr("valign.recipes.baselines.edit_concepts", None)
    assert make_uce(model, edit, tmp_path) == adapter
    with pytest.raises(UserError, match="was made with another recipe"):
        make_uce(model, concept_edit(load_policy("shapes"), lam=0.1), tmp_path)


def test_commands_write_adapters_with_their_origin(tiny_sd, tmp_path):
    shared = ("--model", tiny_sd, "--policy", "shapes", "--category", "violence", "--device", "cpu")
    made = run("uce", *shared, "--guide", "safe", "--preserve", "tree", "-o", tmp_path / "uce")
    assert made == str(tmp_path / "uce" / "adapter")
    record = open_adapter(tmp_path / "uce").metadata
    assert record["edit"]["guides"] == ["flower", "flower"]
    assert (record["category"], record["policy_hash"]) == ("violence", load_policy("shapes").fingerprint())
    for name in ("esd-x", "esd-u"):
        out = tmp_path / name
        run(name, *shared, "-o", out, "--iterations", "1", "--sample-steps", "2", "--rank", "1")
        record = open_adapter(out).metadata
        assert (record["method"], record["concepts"]) == (name, ["flame", "blast"])


def test_commands_refuse_what_makes_no_sense(tiny_sd, tmp_path):
    shared = ("--model", tiny_sd, "--policy", "shapes", "-o", tmp_path / "out")
    with pytest.raises(UserError, match="--guide safe needs the policy's concepts"):
        run("uce", *shared, "--concept", "gun", "--guide", "safe")
    with pytest.raises(UserError, match="--guide must be one text"):
        run("uce", *shared, "--guide", "a", "--guide", "b")
    assert not (tmp_path / "out").exists()
