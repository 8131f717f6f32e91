"""The measurements of the comparison of adapters: trainings with their scores, and what a method costs per step."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from valign.adapters import adapter_bytes, continual_scores, default_targets
from valign.data.tasks.base import TaskData
from valign.evaluation.adapters.weight_change import linears, mean_rank, sharpness, weights_of
from valign.experiments.adapters.settings import Setting
from valign.files import hash_value
from valign.models.heads.task_model import Target, TaskModel
from valign.training.engine.loop import TrainingLoop
from valign.training.engine.processes import start_processes
from valign.training.engine.tuning import Tuning, parse_tuning
from valign.training.tasks.supervised import SupervisedTask, judge, mean_loss

NOISE, DRAWS = 0.1, 4  # of the sharpness: share of a row's root mean square, and how often it is drawn
STATUS = Path("/proc/self/status")
CURVE = 20  # points of a training curve


@dataclass
class Learnt:
    """One task, or several in turn."""

    losses: list[float] = field(default_factory=list)  # of every step
    stream: list[list[float]] = field(default_factory=list)  # after each of several tasks the scores on all of them
    start_seconds: float = 0.0
    train_seconds: float = 0.0


def learn(setting: Setting, model: TaskModel, tuning: Tuning, label: str) -> tuple[SupervisedTask, Learnt]:
    """Learn the setting's tasks in turn; the training task is that of the last.

    They share the steps. After each but the last the method is merged into the weights, and starts anew on the next.
    """
    accelerator = start_processes(cpu=model.device.type == "cpu")
    tasks = setting.stages()
    config = replace(setting.budget.config(setting.seed), steps=setting.budget.steps // len(tasks))
    task, found = None, Learnt()
    for data in tasks:
        if task is not None:
            model.network = task.handle.merged()
        model.target = Target.of(data)
        began = time.perf_counter()
        task = SupervisedTask(model, data, tuning, config, accelerator, label=label)
        loop = TrainingLoop(task, accelerator)
        started = time.perf_counter()
        loop.run()
        found.start_seconds += started - began
        found.train_seconds += time.perf_counter() - started
        found.losses += [record["loss"] for record in loop.records]
        if len(tasks) > 1:
            found.stream.append([scores[data.task.score] for scores in judge_each(model, tasks)])
    assert task is not None
    return task, found


def judge_each(model: TaskModel, tasks: Sequence[TaskData]) -> list[dict[str, float]]:
    """Loss and scores on the held-out rows of each task, whose classes are told. The model ends with those of the last."""
    found = []
    for data in tasks:
        model.target = Target.of(data)
        found.append(judge(model, data.held_out, batch_size=64))
    return found


def judge_all(model: TaskModel, tasks: Sequence[TaskData]) -> dict[str, float]:
    """Means over the tasks."""
    found = judge_each(model, tasks)
    return {name: statistics.fmean(scores[name] for scores in found) for name in found[0]}


def run_once(setting: Setting, tuning: Tuning, *, device: str = "auto", label: str = "") -> dict[str, Any]:
    """Train once, on one task or on several in turn, and measure; JSON-able.

    ``score`` and ``scores`` on held-out rows at the end, ``untrained`` the score before where the model can answer then; ``drift``,
    ``skill``, ``skill_before`` as `Retention`; ``trained`` numbers, ``adapter_bytes``, ``optimizer_bytes``; ``change_rank`` and
    ``sharpness`` of queries and values (the default targets); seconds; ``curve``: training loss, mean over each of up to 20 equal
    stretches; ``mean_loss`` over all steps. Of several tasks scores are means, and numbers, bytes and sharpness those of the last;
    ``stream`` is the scores on all after each, with ``transfer``, ``average``, ``last`` and ``backward`` as `continual_scores`.
    """
    tasks, budget = setting.stages(), setting.budget
    score, model = tasks[0].task.score, setting.load(device)
    kept = setting.probe(model)
    names = linears(model.network, default_targets(model.network))
    before = weights_of(model.network, names)
    untrained = {"untrained": judge_all(model, tasks)[score]} if model.head is None else {}
    task, learnt = learn(setting, model, tuning, label)
    scores = judge_all(model, tasks)
    with TemporaryDirectory() as folder:
        task.handle.save(Path(folder) / "adapter")
        size = adapter_bytes(Path(folder) / "adapter")

    def loss() -> float:
        return mean_loss(model, tasks[-1].train[: 8 * budget.batch_size], batch_size=64)

    return {
        "score": scores[score],
        "scores": scores,
        **untrained,
        **asdict(kept()),
        "trained": task.handle.numbers(),
        "adapter_bytes": size,
        "optimizer_bytes": optimizer_bytes(task.optimizer),
        "change_rank": mean_rank(before, weights_of(model.network, names)),
        "sharpness": sharpness(model.network, before, loss, ratio=NOISE, draws=DRAWS, seed=setting.seed),
        "mean_loss": statistics.fmean(learnt.losses),
        "curve": stretches(learnt.losses, CURVE),
        "steps": len(learnt.losses),
        "start_seconds": learnt.start_seconds,
        "train_seconds": learnt.train_seconds,
        **({"stream": learnt.stream, **continual_scores(learnt.stream)._asdict()} if learnt.stream else {}),
    }


def rehearse(setting: Setting, tuning: Tuning, *, device: str = "auto", label: str = "") -> dict[str, float]:
    """Train once and judge, no more: ``score`` and ``loss``."""
    model, tasks = setting.load(device), setting.stages()
    learn(setting, model, tuning, label)
    found = judge_all(model, tasks)
    return {"score": found[tasks[0].task.score], "loss": found["loss"]}


def stretches(values: list[float], count: int) -> list[float]:
    """Means over ``count`` equal stretches, or the values themselves where they are fewer."""
    count = min(count, len(values))
    cuts = [round(part * len(values) / count) for part in range(count + 1)]
    return [statistics.fmean(values[low:high]) for low, high in pairwise(cuts)]


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What its state holds, in bytes."""
    states = (value for entry in optimizer.state.values() for value in entry.values())
    return sum(value.numel() * value.element_size() for value in states if isinstance(value, torch.Tensor))


def measure_overhead(setting: Setting, name: str, settings: dict[str, Any], *, device: str = "auto") -> dict[str, Any]:
    """Time of a step against LoRA's, step by step in turns in this process, and the peak of memory above the loaded model.

    Run it in a process of its own: what another training left in the heap hides a peak. LoRA comes second, when it is taken.
    """
    ours, base, peak = _stepper(setting, parse_tuning(name, settings), device, measure=True)
    lora, _, _ = _stepper(setting, parse_tuning("lora"), device, measure=False)
    ratios, own = [], []
    for number in range(setting.budget.timed):
        pair = [(ours, 0), (lora, 1)] if number % 2 else [(lora, 1), (ours, 0)]
        seconds = [0.0, 0.0]
        for step, which in pair:
            seconds[which] = step()
        ratios.append(seconds[0] / seconds[1])
        own.append(seconds[0])
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "step_ratio": middle,
        "step_ratio_quartiles": [low, high],
        "step_seconds": statistics.median(own),
        "peak_bytes": max(0, peak - base),
        "timed": len(ratios),
    }


def _stepper(setting: Setting, tuning: Tuning, device: str, *, measure: bool) -> tuple[Callable[[], float], int, int]:
    """A function that takes one step and says how long it took; with ``measure``, memory before and at the peak of three steps."""
    model = setting.load(device)
    accelerator = start_processes(cpu=model.device.type == "cpu")
    where = model.device
    base = peak_memory(where, anew=True) if measure else 0
    task = SupervisedTask(model, setting.rows(), tuning, setting.budget.config(setting.seed), accelerator)
    loop = TrainingLoop(task, accelerator)
    counter = iter(range(10**9))

    def step() -> float:
        _wait(where)
        began = time.perf_counter()
        loop.train_step(next(counter) % setting.budget.steps)
        _wait(where)
        return time.perf_counter() - began

    for _ in range(3):
        step()
    return step, base, peak_memory(where) if measure else 0


def peak_memory(device: torch.device, *, anew: bool = False) -> int:
    """The peak so far, in bytes: of the GPU's allocator, or of the process's resident set; ``anew`` forgets it first, on Linux."""
    if device.type == "cuda":
        if anew:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if anew:
        STATUS.with_name("clear_refs").write_text("5")
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fingerprint(setting: Setting, tuning: Tuning, model_sha256: str) -> str:
    """Of all that decides about a run's numbers, but for the versions."""
    return hash_value(
        {"method": tuning.recipe(), "place": setting.describe(), "model": model_sha256, "data": setting.rows().fingerprint()}
    )
