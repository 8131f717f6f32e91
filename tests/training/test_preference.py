import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path

import pytest
import torch
from dying import killed_at
from pair_data import build_pairs, small_config
from train_script import CONFIG

from valign.checks import UserError
from valign.models.diffusion.lora import load_adapter, unload_adapters
from valign.models.files.adapter_files import open_adapter
from valign.objectives import DiffusionDPO
from valign.training import train_preference
from valign.training.engine.loop import TrainingLoop
from valign.training.engine.metrics import MetricsLog

SCRIPT = Path(__file__).with_name("train_script.py")
OBJECTIVE = DiffusionDPO(beta=500.0)


def train(sd, cache, out, objective=OBJECTIVE, validate=None, **changes):
    return train_preference(sd, cache, cache.rows(), out, small_config(**changes), objective, validate=validate)


def factors(folder):
    return {f"{name}.{part}": getattr(lora, part) for name, lora in open_adapter(folder).items() for part in ("down", "up")}


def equal(left, right):
    return sorted(left) == sorted(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def straight(sd, cache, tmp_path_factory):
    """Eight steps without a stop, as `train_script` does them."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    return train(sd, cache, out, **CONFIG)


def test_a_run_leaves_a_loadable_adapter_and_its_story(sd, cache, straight):
    out = straight.adapter.parent
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "checkpoints", "metrics.jsonl", "run.json"]
    metadata = json.loads((straight.adapter / "valign.json").read_text())
    assert metadata["base_fingerprint"] == sd.fingerprint()
    assert metadata["objective"]["beta"] == 500
    assert metadata["training"]["rank"] == 4
    lines = MetricsLog(out / "metrics.jsonl").read()
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[0]["winner_error"] == lines[0]["winner_reference"]  # step 0 is the base model
    assert straight.metrics["val_loss"] == lines[straight.best_step - 1]["val_loss"]
    load_adapter(sd, straight.adapter, name="trained")
    unload_adapters(sd)


def test_the_adapter_is_that_of_the_best_step(straight):
    best = straight.adapter.parent / "checkpoints" / f"step-{straight.best_step:06d}"
    assert best.is_dir()
    assert json.loads((straight.adapter / "valign.json").read_text())["step"] == straight.best_step


def test_the_model_comes_back_bare(sd, cache, straight):
    assert not getattr(sd.denoiser, "peft_config", None)
    assert not any(p.requires_grad for p in sd.denoiser.parameters())


def test_a_finished_run_is_not_run_again(sd, cache, straight, monkeypatch):
    monkeypatch.setattr(TrainingLoop, "run", None)
    assert train(sd, cache, straight.adapter.parent, **CONFIG) == straight


def test_another_recipe_does_not_overwrite(sd, cache, straight):
    with pytest.raises(UserError, match=r"was made with another recipe: .* was .* and is now .*choose another output folder"):
        train(sd, cache, straight.adapter.parent, **CONFIG, rank=2)


def test_resuming_after_a_kill_gives_the_same_bytes(sd, cache, straight, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), sd.folder, str(cache.folder), str(out), "5"]
    killed = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    assert [line["step"] for line in MetricsLog(out / "metrics.jsonl").read()] == [1, 2, 3, 4, 5]
    assert not (out / "adapter").exists()
    resumed = train(sd, cache, out, **CONFIG)  # from step 4
    assert replace(resumed, adapter=straight.adapter) == straight
    for name in ("adapter/pytorch_lora_weights.safetensors", "metrics.jsonl", "checkpoints/step-000008/optimizer.safetensors"):
        assert (out / name).read_bytes() == (straight.adapter.parent / name).read_bytes(), name


def test_execution_options_give_the_same_factors(sd, cache, straight, tmp_path):
    other = train(sd, cache, tmp_path / "other", **{**CONFIG, "winner_safeguard": None}, accumulation=2, split_pairs=True)
    plain = train(sd, cache, tmp_path / "plain", **{**CONFIG, "winner_safeguard": None}, gradient_checkpointing=True)
    left, right = factors(other.adapter), factors(plain.adapter)
    for name in left:  # AdamW divides by the gradient's own size, which lifts rounding where a gradient is nearly 0
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-4)
    assert not equal(factors(straight.adapter), left)  # the safeguard does something


def test_fixed_draws_train_as_live_ones_do(sd, cache, tmp_path):
    stored = train(sd, cache, tmp_path / "stored", precompute_ref_draws=4, empty_prompt_prob=0.5, safe_prompt_term=True)
    live = train(sd, cache, tmp_path / "live", empty_prompt_prob=0.5, safe_prompt_term=True)  # two epochs: draws 0 and 1
    left, right = factors(stored.adapter), factors(live.adapter)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-4)
    assert len(list((tmp_path / "stored" / "reference").glob("*.safetensors"))) == 2


def test_experts_of_one_seed_share_their_down_factors_at_the_start(sd, cache, tmp_path):
    runs = [train(sd, cache, tmp_path / str(seed), seed=seed, steps=1, learning_rate=1e-12) for seed in (1, 2)]
    left, right = (factors(run.adapter) for run in runs)
    for name in left:
        if name.endswith("down"):
            torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-9)


def test_adafactor_trains_and_resumes(sd, cache, tmp_path, monkeypatch):
    straight = train(sd, cache, tmp_path / "a", optimizer="adafactor", checkpoint_every=2)
    with killed_at(3, monkeypatch):  # after the checkpoint of step 2
        train(sd, cache, tmp_path / "b", optimizer="adafactor", checkpoint_every=2)
    assert not getattr(sd.denoiser, "peft_config", None)
    resumed = train(sd, cache, tmp_path / "b", optimizer="adafactor", checkpoint_every=2)
    assert equal(factors(resumed.adapter), factors(straight.adapter))


def test_patience_stops_and_keeps_the_best(sd, cache, tmp_path):
    scores = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0}
    result = train(sd, cache, tmp_path / "run", validate=scores.__getitem__, steps=9, validate_every=1, patience=2)
    assert (result.steps, result.best_step, result.stopped) == (4, 2, "patience")
    assert result.metrics["val_score"] == 1.0
    assert train(sd, cache, tmp_path / "run", validate=scores.__getitem__, steps=9, validate_every=1, patience=2) == result


def test_drift_beyond_the_limit_is_not_kept(sd, cache, tmp_path):
    scores = {1: 3.0, 2: 2.0, 3: 1.0}
    options = {"steps": 3, "validate_every": 1, "learning_rate": 0.02}
    first = train(sd, cache, tmp_path / "free", validate=scores.__getitem__, max_drift=1e9, **options)
    assert first.best_step == 3
    drifts = [line["drift"] for line in MetricsLog(tmp_path / "free" / "metrics.jsonl").read()]
    assert drifts[0] < drifts[1] < drifts[2]
    held = train(sd, cache, tmp_path / "held", validate=scores.__getitem__, max_drift=drifts[1], **options)
    assert held.best_step == 2


@dataclass(frozen=True)
class RaiseBoth:
    """The failure in its purest form: a loss that falls as the winner's error rises."""

    def __call__(self, errors):
        return -errors.policy_w


def test_displacement_stops_the_training_and_keeps_an_earlier_step(sd, cache, tmp_path, capfd):
    options = {"steps": 40, "val_fraction": 0.0, "checkpoint_every": 1, "displacement_window": 4, "learning_rate": 0.01}
    result = train(sd, cache, tmp_path / "run", RaiseBoth(), **options)
    assert result.stopped == "displacement"
    assert result.best_step < result.steps < 40
    assert "error is" in capfd.readouterr().err
    lines = MetricsLog(tmp_path / "run" / "metrics.jsonl").read()
    last, best = lines[-1], lines[result.best_step - 1]
    assert last["winner_displacement"] > best["winner_displacement"]


@dataclass(frozen=True)
class NotANumberFromStepThree:
    calls: list

    def __call__(self, errors):
        self.calls.append(None)
        return errors.policy_w * (nan if len(self.calls) == 3 else 1.0)


def test_a_loss_that_is_no_number_names_step_timestep_and_pairs(sd, cache, tmp_path):
    with pytest.raises(UserError) as caught:
        train(sd, cache, tmp_path / "run", NotANumberFromStepThree([]), val_fraction=0.0, checkpoint_every=1)
    text = str(caught.value)
    assert "The loss and gradient of step 3 must be finite, got nan at pair p" in text
    assert text.count("(timestep ") == 4
    assert "Kept: " in text
    assert "step-000002" in text
    assert not getattr(sd.denoiser, "peft_config", None)


def test_sample_grids_and_trackers(sd, cache, tmp_path):
    tracker = pytest.importorskip("accelerate.tracking")
    logged = {}

    class Memory(tracker.GeneralTracker):
        name, requires_logging_directory = "memory", False

        def __init__(self, run_name, **_):
            super().__init__()

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            logged["config"] = values

        def log(self, values, step=None, **_):
            logged[step] = values

    tracker.register_tracker_class(Memory)
    train(sd, cache, tmp_path / "run", steps=2, trackers=("memory",), sample_every=1, sample_prompts=("a",), sample_steps=2)
    assert logged["config"]["rank"] == 4
    assert logged[2]["loss"] == MetricsLog(tmp_path / "run" / "metrics.jsonl").read()[1]["loss"]
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == ["step-000001.png", "step-000002.png"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs_per_step": 3, "accumulation": 2}, r"pairs_per_step must be a multiple of processes x accumulation = 2, got 3"),
        ({"sample_every": 1}, r"sample_prompts must not be empty when sample_every is set"),
        ({"targets": ("to_nowhere",)}, r"targets must name .*, got to_nowhere"),
    ],
)
def test_settings_that_cannot_work_are_refused(sd, cache, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(sd, cache, tmp_path / "run", **changes)


def test_data_that_do_not_fit_are_refused(sd, cache, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"must hold at least one pair, got 0"):
        train_preference(sd, cache, cache.rows()[:0], tmp_path / "empty", small_config(), OBJECTIVE)
    plain = build_pairs(sd, tmp_path / "plain", count=3, flip=False)
    with pytest.raises(UserError, match=r"holds no mirrored latents"):
        train(sd, plain, tmp_path / "flip")
    monkeypatch.setattr(plain, "base_fingerprint", "other")
    with pytest.raises(UserError, match=r"was encoded by another base model"):
        train(sd, plain, tmp_path / "base", flip=False)


@pytest.mark.slow
def test_two_processes_match_one(sd, cache, straight, tmp_path):
    """Same global batch; sums over processes are taken in another order, so equal up to rounding, which AdamW lifts."""
    out = tmp_path / "two"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(SCRIPT), sd.folder, str(cache.folder), str(out)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    left, right = factors(out), factors(straight.adapter)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-4)
    lines = [MetricsLog(folder / "metrics.jsonl").read() for folder in (out, straight.adapter.parent)]
    for one, two in zip(*lines, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
