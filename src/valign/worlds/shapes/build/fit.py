"""The networks of a world as tasks of the engine: AdamW, warm-up and cosine decay, weight averaging, a short log."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from valign.training.engine.loop import TrainingLoop
from valign.training.engine.metrics import MetricsLog
from valign.training.engine.processes import start_processes
from valign.training.engine.schedule import Schedule, keep_peaks
from valign.training.engine.task import LoopConfig, TrainingTask

LOG_EVERY = 50  # steps


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long and how fast to train."""

    steps: int
    batch: int
    lr: float
    warmup: int = 100  # steps
    weight_decay: float = 0.01
    ema: float = 0.0  # decay of the averaged weights that are kept; 0 keeps the last ones
    clip: float = 1.0  # largest norm of the gradient
    checkpoint_every: int = 500  # steps

    def shares(self) -> Schedule:
        """Of the learning rate as shares of ``lr``: linear warm-up, then a cosine down to 2 %."""
        return Schedule(steps=self.steps, warmup=self.warmup, decay="cosine", floor=0.02)


def fit(net: nn.Module, loss: Callable[[int], dict[str, Tensor]], budget: Budget, folder: Path, name: str) -> None:
    """Train ``net`` in place on ``loss(step)["loss"]``; every step has random draws of its own seed, so a resumed run repeats none.

    Writes ``folder/name.jsonl`` (means over 50 steps) and the engine's checkpoints and log in ``folder/name``.
    """
    net.train()
    averages = Averages(net, budget.ema)
    task = NetworkTask(net, loss, budget, MetricsLog(folder / f"{name}.jsonl"), name)
    task.hooks = {"averages": averages} if budget.ema else {}
    device = next(net.parameters()).device
    TrainingLoop(task, start_processes(cpu=device.type == "cpu"), out=folder / name).run()
    if budget.ema:
        net.load_state_dict(averages.tensors)
    net.eval()


class Averages:
    """Exponential moving averages of a network's tensors, with a shorter memory in the first steps; a hook of the engine."""

    spent, settled = 0, True

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net, self.decay = net, decay
        self.tensors = {key: value.detach().clone() for key, value in net.state_dict().items()}

    def penalty(self) -> None:
        """There is none."""

    def after_step(self, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        for key, value in self.net.state_dict().items():
            average = self.tensors[key]
            average.lerp_(value, 1 - decay) if value.is_floating_point() else average.copy_(value)

    def extra(self) -> dict[str, Any]:
        return self.tensors

    def restore(self, extra: Mapping[str, Any]) -> None:
        for key, average in self.tensors.items():
            average.copy_(extra[key])


class NetworkTask(TrainingTask):
    """All of a network's tensors, on a loss of named parts."""

    def __init__(
        self, net: nn.Module, loss: Callable[[int], dict[str, Tensor]], budget: Budget, log: MetricsLog, name: str
    ) -> None:
        self.net, self.loss, self.log = net, loss, log
        trained = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=budget.lr, weight_decay=budget.weight_decay, betas=(0.9, 0.99))
        keep_peaks(self.optimizer)
        self.schedule, self.max_norm = budget.shares(), budget.clip
        self.loop = LoopConfig(steps=budget.steps, label=name, checkpoint_every=budget.checkpoint_every)
        self.began, self.parts = perf_counter(), list[dict[str, float]]()  # since the last line of the log

    def tensors(self) -> Mapping[str, Tensor]:
        """Without the second name of a tied tensor, which a safetensors file cannot hold."""
        named = self.net.state_dict()
        first = {tensor.data_ptr(): name for name, tensor in reversed(named.items())}
        return {name: tensor for name, tensor in named.items() if first[tensor.data_ptr()] == name}

    def gradients(self, step: int) -> dict[str, float]:
        parts = self.loss(step)
        parts["loss"].backward()
        self.parts.append({name: float(value.detach()) for name, value in parts.items()})
        return dict(self.parts[-1])

    def inspect(self, number: int, record: Mapping[str, float]) -> str:
        """Write the means of the parts every `LOG_EVERY` steps."""
        if number % LOG_EVERY == 0 or number == self.loop.steps:
            means = {name: round(sum(part[name] for part in self.parts) / len(self.parts), 6) for name in self.parts[0]}
            self.log.append({"step": number, "seconds": round(perf_counter() - self.began, 1), **means})
            self.parts = []
        return ""
