"""The engine on a task of two numbers: hooks, selection, resuming, refusing."""

import json

import pytest
import torch
from dying import killed_at

from valign.checks import UserError
from valign.training.engine.checkpoint import Checkpoints
from valign.training.engine.loop import TrainingLoop
from valign.training.engine.metrics import MetricsLog
from valign.training.engine.processes import start_processes
from valign.training.engine.schedule import Schedule
from valign.training.engine.selection import Selection
from valign.training.engine.task import LoopConfig, TrainingTask, Validation


class Pull:
    """A penalty towards the mean of the weights so far, which is its state."""

    def __init__(self, task, *, settled_from=0, spent=0):
        self.task, self.settled_from, self.spent, self.seen, self.mean = task, settled_from, spent, 0, torch.zeros(2)

    @property
    def settled(self):
        return self.seen >= self.settled_from

    def penalty(self):
        return (self.task.weight - self.mean).square().sum()

    def after_step(self, step):
        assert self.task.weight.grad is not None
        self.seen += 1
        self.mean = self.mean + (self.task.weight.detach() - self.mean) / self.seen

    def extra(self):
        return {"seen": self.seen, "mean": self.mean}

    def restore(self, extra):
        self.seen, self.mean = extra["seen"], extra["mean"]


class Toy(TrainingTask):
    max_norm = 10.0

    def __init__(self, scores=(), stop_at=0, bad_at=0, **hook):
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        self.optimizer = torch.optim.AdamW([self.weight])
        self.schedule = Schedule(steps=6, warmup=2, peak=0.1)
        self.selection = Selection(max_drift=0.5, patience=2)
        self.hooks = {"pull": Pull(self, **hook)}
        self.scores, self.stop_at, self.bad_at = scores, stop_at, bad_at
        self.loop = LoopConfig(
            steps=6, label="toy", checkpoint_every=2, keep_checkpoints=9, validate_every=1 if scores else 0, recipe={"a": 1}
        )

    def gradients(self, step):
        loss = (self.weight - step).square().sum()
        loss.backward()
        return {"loss": float("nan") if step + 1 == self.bad_at else float(loss.detach())}

    def suspects(self):
        return " at row 7"

    def tensors(self):
        return {"weight": self.weight}

    def inspect(self, number, record):
        return "enough" if number == self.stop_at else ""

    def validate(self, number):
        return Validation(self.scores[number - 1], {"val": self.scores[number - 1]})


def run(out, **options):
    task = Toy(**options)
    loop = TrainingLoop(task, start_processes(cpu=True), out=out)
    return task, loop, loop.run()


def test_a_killed_run_goes_on_to_the_same_bytes_with_its_hook(tmp_path, monkeypatch):
    straight, _, _ = run(tmp_path / "straight")
    with killed_at(5, monkeypatch):
        run(tmp_path / "killed")
    resumed, loop, stopped = run(tmp_path / "killed")
    assert [record["step"] for record in loop.records] == [5, 6]
    assert stopped == ""
    assert torch.equal(resumed.weight, straight.weight)
    for name in ("metrics.jsonl", "checkpoints/step-000006/extra.safetensors", "checkpoints/step-000006/optimizer.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_the_penalty_is_part_of_the_gradient_and_rates_are_the_schedules(tmp_path):
    run(tmp_path)
    lines = MetricsLog(tmp_path / "metrics.jsonl").read()
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.05, *[0.1] * 5])
    assert lines[0]["loss"] == 5.0
    assert lines[0]["gradient_norm"] == pytest.approx(4 * 5**0.5)  # 2 w of the loss, and as much of the penalty, |w|^2 = 5


def test_without_a_folder_nothing_is_written_and_records_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, loop, _ = run(None)
    assert [record["step"] for record in loop.records] == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.iterdir())
    assert loop.keep_best() == 6


def test_the_best_step_is_put_back_and_patience_ends_the_run(tmp_path):
    task, loop, stopped = run(tmp_path, scores=(3.0, 1.0, 2.0, 2.0, 0.0, 0.0))
    assert (stopped, loop.done, loop.keep_best()) == ("patience", 4, 2)
    saved = Toy()
    Checkpoints(tmp_path / "checkpoints").load(2, saved.tensors())
    assert torch.equal(task.weight, saved.weight)
    _, loop, stopped = run(tmp_path, scores=(3.0, 1.0, 2.0, 2.0, 0.0, 0.0))
    assert (stopped, loop.records, loop.keep_best()) == ("patience", [], 2)


def test_a_step_is_kept_only_once_all_hooks_have_settled(tmp_path):
    _, loop, _ = run(tmp_path, scores=(0.0, 0.0, 3.0, 2.0, 9.0, 9.0), settled_from=3)
    assert loop.keep_best() == 4


def test_a_hook_may_have_spent_steps_of_the_budget(tmp_path):
    _, loop, _ = run(tmp_path, spent=3)
    assert [record["step"] for record in loop.records] == [4, 5, 6]


def test_a_task_may_stop_the_run_and_the_step_is_saved(tmp_path):
    _, loop, stopped = run(tmp_path, stop_at=3)
    assert (stopped, loop.done) == ("enough", 3)
    assert json.loads((tmp_path / "checkpoints" / "step-000003" / "state.json").read_text())["stopped"] == "enough"


def test_a_loss_that_is_not_finite_names_step_data_and_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"of step 4 must be finite, got nan at row 7\. Kept: .*step-000002\. Lower the learning"):
        run(tmp_path, bad_at=4)
