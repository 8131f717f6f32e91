"""One small, resumable training loop for all networks of a world: AdamW, warm-up and cosine decay, weight averaging, a log."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from valign.files import atomic_path
from valign.progress import track


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


def rate(step: int, budget: Budget) -> float:
    """Share of the peak learning rate at ``step``: linear warm-up, then a cosine down to 2 %."""
    if step < budget.warmup:
        return (step + 1) / budget.warmup
    return 0.02 + 0.98 * (1 + math.cos(math.pi * (step - budget.warmup) / max(budget.steps - budget.warmup, 1))) / 2


def fit(net: nn.Module, loss: Callable[[int], dict[str, Tensor]], budget: Budget, folder: Path, name: str) -> None:
    """Train ``net`` in place on ``loss(step)["loss"]``; every step draws from its own seed, so a resumed run repeats nothing.

    Writes `folder/name.ckpt.safetensors` (weights, averages, moments) and `folder/name.jsonl` (one line per 50 steps).
    """
    trained = {key: p for key, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=budget.lr, weight_decay=budget.weight_decay, betas=(0.9, 0.99))
    average = {key: value.detach().clone() for key, value in net.state_dict().items()} if budget.ema else {}
    checkpoint, log = folder / f"{name}.ckpt.safetensors", folder / f"{name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    first = _restore(checkpoint, net, trained, optimizer, average)
    began, count = perf_counter(), 0
    sums: dict[str, float] = {}
    net.train()
    for step in track(range(first, budget.steps), name, total=budget.steps, done=first):
        for group in optimizer.param_groups:
            group["lr"] = budget.lr * rate(step, budget)
        parts = loss(step)
        optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), budget.clip)
        optimizer.step()
        if budget.ema:
            decay = min(budget.ema, (step + 1) / (step + 10))
            for key, value in net.state_dict().items():
                average[key].lerp_(value, 1 - decay) if value.is_floating_point() else average[key].copy_(value)
        for key, value in parts.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        count += 1
        if (step + 1) % 50 == 0 or step + 1 == budget.steps:
            line = {
                "step": step + 1,
                "seconds": round(perf_counter() - began, 1),
                **{k: round(v / count, 6) for k, v in sums.items()},
            }
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            sums, count = {}, 0
        if (step + 1) % budget.checkpoint_every == 0 or step + 1 == budget.steps:
            _save(checkpoint, step + 1, net, trained, optimizer, average)
    if average:
        net.load_state_dict(average)
    net.eval()


def _moments(trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for key, parameter in trained.items():
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            if moment in optimizer.state[parameter]:
                yield f"{moment}:{key}", optimizer.state[parameter][moment]


def _save(
    path: Path, step: int, net: nn.Module, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, average: dict
) -> None:
    tensors = {f"net:{key}": value for key, value in net.state_dict().items()}
    tensors |= {f"average:{key}": value for key, value in average.items()} | dict(_moments(trained, optimizer))
    tensors["progress"] = torch.tensor(step)
    with atomic_path(path) as temporary:
        save_file({key: value.detach().clone().contiguous() for key, value in tensors.items()}, temporary)


def _restore(path: Path, net: nn.Module, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, average: dict) -> int:
    if not path.exists():
        return 0
    tensors = load_file(path)
    net.load_state_dict({key.removeprefix("net:"): value for key, value in tensors.items() if key.startswith("net:")})
    for key in average:
        average[key] = tensors[f"average:{key}"]
    for key, parameter in trained.items():
        optimizer.state[parameter] = {moment: tensors[f"{moment}:{key}"] for moment in ("step", "exp_avg", "exp_avg_sq")}
    return int(tensors["progress"])
