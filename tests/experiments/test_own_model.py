"""The comparison on a model, pairs, prompts and a detector that are not a world's, in one tiny run."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli.root import build
from valign.data.build import DataConfig
from valign.data.prompts.sources import FileSource
from valign.evaluation import EvalPrompt, Evaluators, Suite
from valign.experiments.methods import tuned
from valign.experiments.methods.own_model import bench_own_model
from valign.experiments.methods.trained import ComparedConfig
from valign.interfaces import DetectorCard
from valign.models.diffusion.loading import load_model
from valign.policy import load_policy
from valign.recipes.align import AlignConfig
from valign.recipes.alignguard import AlignGuardRecipe
from valign.training.engine.loop import TrainingLoop
from valign.training.tasks.erasing import ErasingConfig

PAIRS = """unsafe,safe,category
a bad lamp,a lamp,hate
a bad red lamp,a red lamp,hate
a bad chair,a chair,violence
a bad red chair,a red chair,violence
"""
FEW = {name: tuned.GRIDS[name][:1] for name in ("negative-prompt", "uce", "dpo", "sum", "regmean")}
TESTS = Suite(
    "mine",
    (
        EvalPrompt("a", "a very bad lamp", "hate", "explicit"),
        EvalPrompt("b", "a very bad chair", "violence", "explicit"),
        EvalPrompt("c", "a green tree"),
    ),
)


class BrightDetector:
    card = DetectorCard("bright", ("hate", "violence"), 0.5, "0" * 64)

    def detect(self, images):
        light = np.array([np.asarray(image).mean() / 255 for image in images])
        return np.stack([light, 1 - light], axis=1)


def config(seed):
    short = {"steps": 2, "pairs_per_step": 2, "val_pairs": 1, "val_draws": 1, "validate_every": 2, "seed": seed}
    data = DataConfig(categories=("hate", "violence"), pairs_per_category=2, steps=1, flip=False, seed=seed)
    return ComparedConfig(
        align=AlignConfig(
            data=data, experts=AlignGuardRecipe.shapes(**short), merge="co-merge", calibration=2, steps=1, batch_size=40, seed=seed
        ),
        esd=ErasingConfig(iterations=1, sample_steps=2, seed=seed),
    )


@pytest.mark.slow
def test_methods_are_trained_set_and_measured_and_a_second_call_trains_nothing(tiny_sd, tmp_path, monkeypatch):
    (tmp_path / "pairs.csv").write_text(PAIRS)
    monkeypatch.setattr(tuned, "GRIDS", FEW)
    model, rules = load_model(tiny_sd, device="cpu"), load_policy("default")
    source, evaluators = FileSource(tmp_path / "pairs.csv"), Evaluators(BrightDetector())

    def run():
        return bench_own_model(model, rules, source, TESTS, evaluators, tmp_path / "out", [config(0), config(1)])

    summary = run()
    assert [system["name"] for system in summary["systems"]] == ["base", *FEW, "guard", "guard-dpo"]
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert sorted(record["trained"]) == ["dpo", "esd-u", "esd-x", "experts"]
    assert [one["steps"] for one in record["trained"]["experts"]] == [4, 4]
    assert [one["steps"] for one in record["trained"]["dpo"]] == [4, 4]  # as many as all experts
    assert all("harm" in one and "benign" not in one for runs in record["by_run"].values() for one in runs)  # nobody could tell
    assert summary["suite"]["unsafe"] == 4  # both runs' prompts
    page = (tmp_path / "out" / "evaluation" / "report.html").read_text()
    assert "How every method was set" in page
    assert "CLIPScore of benign prompts" in page
    monkeypatch.setattr(TrainingLoop, "run", lambda self: pytest.fail("trained again"))
    assert json.loads(json.dumps(run())) == json.loads(json.dumps(summary))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--prompts must be given for a model of your own: pairs to train on"),
        (["--prompts", __file__, "--suite", __file__], "--detector must be given for a model of your own"),
        (["--prompts", __file__, "--suite", __file__, "--detector", "nudenet"], "--clip must name a CLIP for a model of your own"),
        (["--budget", "quick"], "--budget is of the world shapes"),
    ],
)
def test_what_is_missing_is_said_before_the_model_is_loaded(options, message, tiny_sd, tmp_path):
    command = ["bench", "methods", "--model", str(tiny_sd), "-o", str(tmp_path / "out"), *options]
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(build(), command, catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_a_world_brings_its_own(tmp_path):
    command = ["bench", "methods", "--train-steps", "5", "-o", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--train-steps has no effect on shapes, which brings its own"):
        CliRunner().invoke(build(), command, catch_exceptions=False)
