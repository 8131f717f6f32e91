"""What a run needs before it starts, and whether it fits: memory, disk and time of every phase, from configurations alone."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import psutil
import torch

from valign.checks import UserError
from valign.memory import MemoryConfig
from valign.models.devices import choose_device
from valign.recipes.footprints import Phase

GB = 1e9
LIBRARIES = {"cpu": 0.9 * GB, "cuda": 0.8 * GB}  # python with torch, diffusers and transformers; a CUDA context
ROOM = 0.97  # share of the free memory that may be planned with
EFFICIENCY = 0.75  # of a network's pass against one convolution of its kind


@dataclass(frozen=True)
class Machine:
    """Where a run would go."""

    device: str
    free: float  # bytes of the device's memory that a run may take
    disk: float  # free bytes where the run would be written
    speed: float | None = None  # floating-point operations a second; None: not known
    reading: float = inf  # bytes of weights a second that a pass with one row reads, see `valign.models.footprint.weights_read`

    @property
    def kind(self) -> str:
        return self.device.partition(":")[0]


@dataclass(frozen=True)
class Estimate:
    """What a run needs, with the memory options that were chosen for it."""

    machine: Machine
    memory: MemoryConfig
    phases: tuple[Phase, ...]
    start: float | None = None  # seconds until the first phase: libraries, this estimate, and the networks from disk

    @property
    def peak(self) -> float:
        """Bytes of the device's memory, with the libraries."""
        return max(phase.memory for phase in self.phases) + LIBRARIES.get(self.machine.kind, 0.0)

    @property
    def disk(self) -> float:
        return sum(phase.disk for phase in self.phases)

    def seconds(self, phase: Phase) -> float | None:
        return phase.flops / self.machine.speed + phase.reads / self.machine.reading if self.machine.speed else None

    @property
    def fits(self) -> bool:
        return self.peak <= ROOM * self.machine.free

    def record(self) -> dict[str, Any]:
        """JSON-able, in GB (10^9 bytes) and seconds."""
        seconds = [self.seconds(phase) for phase in self.phases]
        return {
            "device": self.machine.device,
            "free_gb": round(self.machine.free / GB, 2),
            "peak_gb": round(self.peak / GB, 2),
            "disk_gb": round(self.disk / GB, 3),
            "free_disk_gb": round(self.machine.disk / GB, 1),
            "fits": self.fits,
            "start_seconds": None if self.start is None else round(self.start, 1),
            "memory": {name: value for name, value in vars(self.memory).items() if value != getattr(MemoryConfig(), name)},
            "phases": [
                {
                    "phase": phase.name,
                    "memory_gb": round((phase.memory + LIBRARIES.get(self.machine.kind, 0.0)) / GB, 2),
                    "disk_gb": round(phase.disk / GB, 3),
                    "seconds": None if one is None else round(one, 1),
                }
                for phase, one in zip(self.phases, seconds, strict=True)
            ],
        }


def planned_device(device: str, memory: MemoryConfig) -> torch.device:
    """As `choose_device`; a card may also be elsewhere, where ``memory.limit`` says how large it is.

    Raises: UserError for a card that is not here and of which nothing is known.
    """
    if not device.startswith("cuda") or torch.cuda.is_available():
        return choose_device(device)
    if memory.limit is None:
        raise UserError(f"device {device} is not here: say by --memory-limit how many GB it has, or use device cpu.")
    return torch.device(device)


def this_machine(device: torch.device, memory: MemoryConfig, out: Path = Path()) -> Machine:
    """What is free now on a device; ``memory.limit`` counts instead, where it is set."""
    if memory.limit is not None:
        free = memory.limit * GB
    elif device.type == "cuda":
        free = float(torch.cuda.mem_get_info(device)[0])
    else:
        free = float(psutil.virtual_memory().available)
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    return Machine(str(device), free, float(shutil.disk_usage(place).free))


def measure_speed(device: torch.device, precision: str, *, seconds: float = 0.6) -> tuple[float, float]:
    """Floating-point operations a second, and bytes of weights that are read a second, of convolutions as SD has them.

    One has many pixels; the other has so few that reading its weight is all that takes time. Of its processors' time on a CPU.
    """
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    rates = []
    for channels, side in ((320, 64), (1280, 2)):
        layer = torch.nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype).requires_grad_(False)
        image = torch.randn(2, channels, side, side, device=device, dtype=dtype)
        rates.append(_calls_a_second(partial(layer, image), device, seconds))
    return EFFICIENCY * rates[0] * 2 * 2 * 320 * 320 * 9 * 64 * 64, rates[1] * 1280 * 1280 * 9 * dtype.itemsize


def measure_loading(*, size: int = 2**24) -> float:
    """Bytes a second of weights that are hashed twice, as the identity of a model is, and converted."""
    block = torch.zeros(size // 2, dtype=torch.float16)
    start = time.process_time()
    for _ in range(2):
        hashlib.sha256(block.numpy().data)
    block.to(torch.bfloat16)
    return size / (time.process_time() - start)


def _calls_a_second(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time  # on a CPU other work must not count
    call()
    done, start = 0, clock()
    while (spent := clock() - start) < seconds or not done:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done += 1
    return done / spent


Phases = Callable[[MemoryConfig], Iterable[Phase]]


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run that is planned.

    Args:
        phases: What it needs under given memory options.
        rows: Rows (or pairs) whose gradients make a step; None where nothing is trained.
        pairs: Whether they are pairs.
        networks: Whether text encoders and an autoencoder lie beside the network that works.
        weights: Bytes of the networks that are read from disk.
        smaller: Other options of the command that would need less, as they are typed, with the phases then.
    """

    phases: Phases
    rows: int | None = None
    pairs: bool = False
    networks: bool = True
    weights: Callable[[], int] = lambda: 0
    smaller: Mapping[str, Phases] = field(default_factory=dict)


def plan(run: PlannedRun, memory: MemoryConfig, machine: Machine) -> Estimate:
    """The cheapest choice of what ``memory`` leaves open that fits the machine; the most sparing one if none does.

    None of the choices changes a result beyond rounding.
    """
    tried = None
    for changes in _ladder(memory, run, machine.kind == "cuda"):
        chosen = replace(memory, **changes)
        tried = Estimate(machine, chosen, tuple(run.phases(chosen)))
        if tried.fits:
            break
    assert tried is not None  # the ladder has a first rung
    return tried


def _ladder(memory: MemoryConfig, run: PlannedRun, card: bool) -> Iterator[dict[str, Any]]:
    """Changes of options that are open, from the cheapest to the most sparing; the first is none."""
    parts = [part for part in range(2, (run.rows or 1) + 1) if (run.rows or 1) % part == 0 and memory.accumulation is None]
    changes: dict[str, Any] = {}
    yield {}
    for part in parts:
        yield {"accumulation": part}
    if run.rows is not None and run.networks and not card and memory.phased is None:
        changes["phased"] = True
        yield {**changes, **({"accumulation": parts[-1]} if parts else {})}
    if run.rows is not None and memory.gradient_checkpointing is None:
        changes["gradient_checkpointing"] = True
        yield dict(changes)
        for part in parts:
            yield {**changes, "accumulation": part}
    changes |= {"accumulation": parts[-1]} if parts else {}
    if run.pairs and memory.split_pairs is None:
        changes["split_pairs"] = True
        yield dict(changes)
    if card and run.networks and memory.offload is None and not memory.phased:
        yield {**changes, "offload": True}


def refuse_beyond(run: PlannedRun, estimate: Estimate, given: MemoryConfig) -> None:
    """Refuse a run that is beyond the machine.

    Args: given: The memory options that somebody set.
    Raises: UserError with the option that would make it fit, if there is one.
    """
    machine, worst = estimate.machine, max(estimate.phases, key=lambda phase: phase.memory)
    if estimate.disk > machine.disk:
        raise UserError(
            f"The run would write about {estimate.disk / GB:.1f} GB, and {machine.disk / GB:.1f} GB are free there. "
            "Name another --out."
        )
    if estimate.fits:
        return
    remedy = _remedy(run, given, machine)
    raise UserError(
        f"The run needs about {estimate.peak / GB:.2f} GB in its phase '{worst.name}', and {machine.free / GB:.2f} GB are free on "
        f"{machine.device}. {remedy or 'No option makes it fit: use a device with more memory, or a smaller model.'}"
    )


def _remedy(run: PlannedRun, given: MemoryConfig, machine: Machine) -> str:
    """The first option that would make it fit, with what it would need then; "" if none would."""
    usual = MemoryConfig()
    for name in ("gradient_checkpointing", "accumulation", "split_pairs", "phased", "offload"):
        if getattr(given, name) != getattr(usual, name):
            usual_one: dict[str, Any] = {name: None}
            found = plan(run, replace(given, **usual_one), machine)
            if found.fits:
                return f"Leave out memory.{name}: it needs {found.peak / GB:.2f} GB then."
    for typed, phases in run.smaller.items():
        found = plan(replace(run, phases=phases), given, machine)
        if found.fits:
            return f"With {typed} it needs {found.peak / GB:.2f} GB."
    if given.precision in ("auto", "float32") and machine.kind == "cpu":
        found = plan(run, replace(given, precision="bfloat16"), machine)
        if found.fits:
            return f"With --precision bfloat16 it needs {found.peak / GB:.2f} GB."
    return ""
