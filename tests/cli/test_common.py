"""Names on the command line."""

import shutil

import pytest
import torch
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli import common
from valign.cli.root import build
from valign.models.files import fingerprint
from valign.models.files.adapter_files import LoraFactors, save_adapter
from valign.policy import load_policy


@pytest.mark.parametrize("name", ["", "oracel", "safety-checker", "clip-probe=", "nudenet=x", "oracle=x", "oracle+x"])
def test_an_unknown_detector_lists_the_known(name):
    with pytest.raises(UserError, match="detector must be oracle, nudenet, safety-checker=FOLDER, clip-probe=FOLDER"):
        common.resolve_detector(name, model="shapes")


def test_detectors_join():
    both = common.resolve_detector("oracle+shapes", model="shapes")
    one = common.resolve_detector("oracle", model="shapes")
    assert len(both.card.classes) == 2 * len(one.card.classes)


def test_readers_may_be_left_out():
    assert common.resolve_fidelity("none", model="shapes") is None
    assert common.resolve_clip(None, model="shapes") is None
    with pytest.raises(UserError, match="fidelity must be oracle or none; got 'clip'"):
        common.resolve_fidelity("clip", model="shapes")


def test_what_knows_a_world_is_refused_for_another_model(tiny_sd):
    for place in (str(tiny_sd), "owner/name-that-is-not-here", "no such folder"):
        with pytest.raises(
            UserError, match=r"world-oracle judges images of models of the world shapes only, and .* is not one of them"
        ):
            common.resolve_detector("oracle", model=place)
        with pytest.raises(UserError, match="world-oracle judges images of models of the world shapes only"):
            common.resolve_fidelity("oracle", model=place)
        for resolve in (common.resolve_clip, common.resolve_contrast):
            with pytest.raises(UserError, match=r"--clip must not be of the world shapes for .*, which is not one of its models"):
                resolve("shapes", model=place)
    with pytest.raises(UserError, match=r"--clip must not be of the world shapes"):
        common.resolve_contrast("oracle", model=str(tiny_sd))


def test_a_folder_that_says_its_world_is_judged_by_its_oracle(tiny_sd, tmp_path):
    folder = tmp_path / "derived"
    shutil.copytree(tiny_sd, folder)
    (folder / "valign_world.json").write_text('{"world": "shapes", "version": 2}')
    assert common.resolve_detector("oracle", model=str(folder)).card.name == "world-oracle"


def test_the_shapes_world_is_found_by_name():
    model = common.resolve_model("shapes")
    assert model.family == "stable-diffusion"
    assert common.resolve_suite("shapes", load_policy("shapes")).prompts
    assert common.resolve_clip("shapes", model="shapes") is not None


def test_only_a_world_makes_prompt_pairs():
    (pair,) = common.resolve_grammar(load_policy("shapes")).pairs("violence", 1, 0)
    assert pair.categories == ("violence",)
    with pytest.raises(UserError, match="policy default has no grammar"):
        common.resolve_grammar(load_policy("default"))


@pytest.mark.parametrize(
    "line",
    [
        "generate lamp -o a.png",
        "serve --guard default --detector none",
        "evaluate --suite suite.csv --detector nudenet -o out",
    ],
)
def test_an_adapter_of_another_model_is_refused_before_the_model_is_loaded(line, tiny_sd, tmp_path, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("the model was loaded")

    command = line.split()[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"valign.cli.{command}.resolve_model", loaded)
    monkeypatch.setattr("valign.cli.evaluate.resolve_detector", lambda *_, **__: None)
    monkeypatch.setattr("valign.evaluation.counted_categories", lambda *_: None)
    (tmp_path / "suite.csv").write_text("prompt,label,category\na fight,1,violence\na lamp,0,\n")
    factors = {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": LoraFactors(torch.ones(2, 3), torch.ones(4, 2), 1.0)}
    save_adapter(tmp_path / "other", factors, metadata={"base": "xl", "base_fingerprint": "0" * 64, "family": "sdxl"})
    shared = ["--model", str(tiny_sd), "--adapter", "other"]
    found = CliRunner().invoke(build(), [*line.split(), *shared])
    assert "other was made for another model than" in str(found.exception)


def test_a_models_hash_is_read_again_only_when_a_file_changed(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text("{}")
    read = []
    monkeypatch.setattr(fingerprint, "hash_file", lambda file: read.append(file) or file.read_text())
    first = fingerprint.fingerprint_folder(tmp_path)
    assert fingerprint.fingerprint_folder(tmp_path) == first
    assert len(read) == 1
    (tmp_path / "model_index.json").write_text("{} ")
    assert fingerprint.fingerprint_folder(tmp_path) != first
