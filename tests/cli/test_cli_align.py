"""``valign align``: what is refused before a model is loaded."""

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli import align as cli
from valign.interfaces import DetectorCard

app = typer.Typer()
app.command(**cli.command.options)(cli.command)


class Judge:
    card = DetectorCard("judge", ("nude",), 0.5, "0" * 64, covers={"nude": "sexual"})

    def detect(self, images):
        return np.zeros((len(images), 1))


@pytest.fixture
def run(tmp_path, monkeypatch, hub):
    def refuse(name, **options):
        raise AssertionError("loaded")

    monkeypatch.setattr(cli, "resolve_model", refuse)
    monkeypatch.setattr(cli, "resolve_detector", lambda name, model: Judge())
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"unsafe": "a fist fight", "safe": "a dance", "category": "violence"}) + "\n")
    shared = ["--model", "owner/m", "--prompts", str(tmp_path / "pairs.jsonl"), "-o", str(tmp_path / "out"), "--detector", "oracle"]

    def call(*given):
        result = CliRunner().invoke(app, [*shared, *given])
        assert isinstance(result.exception, UserError), result.exception
        assert not (tmp_path / "out").exists()
        return str(result.exception)

    return call


def test_a_filter_detector_without_a_filter_is_refused(run):
    assert "--filter-detector has no effect with --filter none" in run("--filter", "none", "--filter-detector", "nudenet")


def test_a_judge_of_none_of_the_trained_categories_is_refused(run):
    assert "Detector judge must measure one of the categories violence; it measures sexual" in run("--category", "violence")


def test_a_limit_that_drops_a_trained_category_is_refused(run):
    said = run("--category", "violence", "--category", "sexual", "--limit", "2")
    assert "must keep at least 3 prompts, one of each of sexual, violence and a benign one, got a limit of 2" in said


def test_options_without_effect_are_refused(run):
    assert "--search has no effect with strength 1" in run("--strength", "1", "--search", "60")
    assert "--calibration has no effect with the merge sum" in run("--merge", "sum", "--calibration", "9")
    assert "--chat-model has no effect unless endpoint is set" in run("--chat-model", "m")


def test_a_world_brings_its_own_tuning_prompts_and_reader(tiny_sd):
    """They say what is right and which counterpart is wanted, as prompts of the training data do not."""
    from valign.policy import load_policy

    assert cli.world_of("shapes", load_policy("shapes")).name == "shapes"
    assert cli.world_of("shapes", load_policy("default")) is None
    assert cli.world_of(str(tiny_sd), load_policy("shapes")) is None
