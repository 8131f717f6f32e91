"""Whether a run fits the machine: said, and refused, before any weight is loaded. Heavy imports wait until called."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Exit, Option

from valign.cli.common import err, find_world, out
from valign.memory import MemoryConfig

if TYPE_CHECKING:
    from valign.interfaces import SamplingConfig
    from valign.models.diffusion.sketch import Sketch
    from valign.recipes.estimate import Estimate, PlannedRun
    from valign.recipes.footprints import DiffusionPhases, Phase

SMALL = 0.02  # share of the free memory up to which a model's weights are not worth an estimate

EstimateOnly = Annotated[
    bool, Option("--estimate", help="say what memory, disk and time the run needs, and stop; loads no weights")
]


def processes() -> int:
    """Of ``accelerate launch``."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def diffusion_folder(name: str) -> Path | None:
    """Of a world's bundled model, a folder, or a hub model that is in the cache; None for what is not here."""
    from valign.models.files.hub import local_folder

    world = find_world(name)
    return world.model_folder() if world else local_folder(name)


def diffusion_run(
    folder: Path | None,
    memory: MemoryConfig,
    device: str,
    make: Callable[[DiffusionPhases], Iterable[Phase]],
    *,
    smaller: Mapping[str, Callable[[DiffusionPhases], Iterable[Phase]]] | None = None,
    **options: Any,
) -> PlannedRun:
    """The run of a diffusion model, whose phases ``make`` gives; ``options`` are those of `PlannedRun`."""
    from valign.models.devices import choose_dtype
    from valign.models.diffusion.sketch import Sketch
    from valign.recipes.estimate import PlannedRun, planned_device
    from valign.recipes.footprints import DiffusionPhases

    place, known = planned_device(device, memory), {}

    def sketch(chosen: MemoryConfig) -> Sketch:
        given = str(choose_dtype(place)).removeprefix("torch.") if chosen.precision == "auto" else chosen.precision
        precisions = tuple("float32" if name == "float32" else "bfloat16" for name in (given, chosen.vae_precision))
        if precisions not in known:
            assert folder is not None  # without one nothing is planned
            known[precisions] = Sketch(folder=folder, precision=precisions[0], vae_precision=precisions[1])
        return known[precisions]

    def of(ask: Callable[[DiffusionPhases], Iterable[Phase]]) -> Callable[[MemoryConfig], Iterable[Phase]]:
        return lambda chosen: ask(
            DiffusionPhases(sketch=sketch(chosen), memory=chosen, cuda=place.type == "cuda", processes=processes())
        )

    def weights() -> int:
        assert folder is not None
        return weights_on_disk(folder) or sketch(memory).bytes()

    return PlannedRun(
        phases=of(make), weights=weights, smaller={typed: of(ask) for typed, ask in (smaller or {}).items()}, **options
    )


def fit(
    run: Callable[[], PlannedRun], folder: Path | None, memory: MemoryConfig, device: str, where: Path, *, only: bool = False
) -> MemoryConfig:
    """The memory options of a run, chosen by what is free and printed.

    Args:
        run: Made only where it is needed.
        folder: Of the model; None for one that is not here yet, of which nothing can be said.
        where: The run's folder, whose disk is asked.
        only: Print the estimate and stop.
    Raises: UserError for a run beyond the machine, with the option that would make it fit.
    """
    from valign.recipes.estimate import plan, planned_device, refuse_beyond, this_machine

    machine = this_machine(planned_device(device, memory), memory, where)
    if not only and (folder is None or (memory.limit is None and weights_on_disk(folder) < SMALL * machine.free)):
        return memory
    planned = run()
    found = plan(planned, memory, machine)
    if only:
        print_estimate(timed(planned, found, device, memory))
        raise Exit
    refuse_beyond(planned, found, memory)
    chosen = found.memory.said()
    needed, free = f"{found.peak / 1e9:.1f}", f"{machine.free / 1e9:.1f} GB free on {machine.device}"
    if os.environ.get("RANK", "0") == "0":
        err.print(f"memory: about {needed} of {free}{': ' if chosen else ''}{chosen}", style="dim", highlight=False, soft_wrap=True)
    return found.memory


def fit_sampling(model: str, memory: MemoryConfig, device: str, out: Path, images: int, sampling: SamplingConfig) -> MemoryConfig:
    """The memory options of a command that generates so many images and trains nothing, chosen as `fit` does."""
    place = diffusion_folder(model)

    def at(size: int) -> Callable[[DiffusionPhases], Iterable[Phase]]:
        return lambda known: [known.sampling("generate images", images, replace(sampling, batch_size=size))]

    def plan() -> PlannedRun:
        assert place is not None  # `fit` asks for what is here
        smaller = {f"--batch-size {size}": at(size) for size in (4, 1) if size < sampling.batch_size}
        return diffusion_run(place, memory, device, at(sampling.batch_size), smaller=smaller)

    return fit(plan, place, memory, device, out)


def weights_on_disk(folder: Path) -> int:
    """Bytes of the safetensors files of a model's folder."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def timed(run: PlannedRun, estimate: Estimate, device: str, memory: MemoryConfig) -> Estimate:
    """With the machine's speed, which is measured in a second; unknown of a card that is elsewhere."""
    import time

    import torch

    from valign.models.devices import choose_dtype
    from valign.recipes.estimate import measure_loading, measure_speed, planned_device

    place = planned_device(device, memory)
    if place.type == "cuda" and not torch.cuda.is_available():
        return estimate
    given = str(choose_dtype(place)).removeprefix("torch.") if memory.precision == "auto" else memory.precision
    start = time.process_time() + run.weights() / measure_loading()  # a run imports and plans the same
    speed, reading = measure_speed(place, given)
    return replace(estimate, machine=replace(estimate.machine, speed=speed, reading=reading), start=start)


def print_estimate(estimate: Estimate, *, as_json: bool = False) -> None:
    """A row per phase."""
    record = estimate.record()
    if as_json:
        out.print_json(json.dumps(record))
        return
    table = Table("phase", "memory GB", "disk GB", "time, at least", box=None, header_style="bold")
    table.add_row("start, and read the networks", "", "", _duration(record["start_seconds"]))
    for phase in record["phases"]:
        table.add_row(phase["phase"], f"{phase['memory_gb']:.2f}", f"{phase['disk_gb']:.3f}", _duration(phase["seconds"]))
    out.print(table)
    chosen = estimate.memory.said() or "none needed"
    verdict = "fits" if estimate.fits else "does not fit"
    out.print(
        f"{verdict}: {record['peak_gb']:.1f} GB at the peak, {record['free_gb']:.1f} GB free on {record['device']}; "
        f"{record['disk_gb']:.2f} GB of disk. Memory options: {chosen}.",
        highlight=False,
        soft_wrap=True,
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
