"""Devices and processes, by accelerate. Few factors are trained, so processes agree by one sum over a flat tensor per step."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from valign.trackers import check_trackers

T = TypeVar("T")


def start_processes(
    *, mixed_precision: str = "no", trackers: tuple[str, ...] = (), folder: Path | None = None, cpu: bool = False
) -> Accelerator:
    """Join the processes of ``accelerate launch`` (or be the only one) and share out the CPU's cores.

    Raises: UserError for a tracker that accelerate does not know, or whose package is missing.
    """
    check_trackers(trackers)
    accelerator = _accelerator(mixed_precision=mixed_precision, log_with=list(trackers) or None, project_dir=folder, cpu=cpu)
    if accelerator.device.type == "cpu" and accelerator.num_processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // accelerator.num_processes))
    return accelerator


def _accelerator(**options: Any) -> Accelerator:
    """accelerate keeps one precision and device per process of the system; a later training may ask for others."""
    try:
        return Accelerator(**options)
    except ValueError:
        if PartialState().num_processes > 1:
            raise
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(**options)


def local_device(device: str) -> str:
    """``"auto"`` in a process of ``accelerate launch`` is that process' own GPU, so that a model is not loaded onto the first."""
    if device == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def reduce_sum(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum over processes, equal on each."""
    return tensor if accelerator.num_processes == 1 else accelerator.reduce(tensor, reduction="sum")


def flatten_gradients(parameters: Sequence[Tensor], extra: Tensor) -> Tensor:
    """All gradients and ``extra`` as one float32 vector, so that processes need one sum per step."""
    zeros = (p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters)
    return torch.cat([*(gradient.flatten().float() for gradient in zeros), extra.float()])


def spread_gradients(parameters: Sequence[Tensor], flat: Tensor) -> Tensor:
    """Undo `flatten_gradients`: write the gradients back, return ``extra``."""
    sizes = [parameter.numel() for parameter in parameters]
    *gradients, extra = flat.split([*sizes, len(flat) - sum(sizes)])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)
    return extra


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do ``work`` on the first process and give every process its result, or its error: none is left waiting."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [work(), None]
        except Exception as error:
            outcome = [None, error]
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
