"""What does one training step of a published size cost, ours against the stock research script's way? Prints one table.

    OMP_NUM_THREADS=1 python benchmarks/real_size.py                    # Stable Diffusion 1.5 at 512 px, one pair
    OMP_NUM_THREADS=1 python benchmarks/real_size.py --model sdxl --pixels 512 --variant "ours, bfloat16"
    python benchmarks/real_size.py --pairs 4                            # on a GPU, where there is one

Stock is what diffusers' research example for Diffusion-DPO does at every step: encode both images and the text, one forward with
the LoRA and one without, AdamW, no checkpointing, all networks in memory. Ours is a whole step of `valign train alignguard`: cached
latents and text, cached reference errors (their pass per draw is not in the step), gradient checkpointing, the denoiser alone in
memory. Weights are random, in the published sizes. Each variant runs in a process of its own. On a CPU seconds are those of the
processor, so that other work on the machine does not count, and the peak is what was resident beyond the libraries: while the model
was loaded, and in the step. `valign estimate` is what is said before, from the configurations alone.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import Process
from pathlib import Path
from typing import Any

from dpo_step import make_data, settle, stock

VARIANTS = ("stock, float32", "ours, float32", "ours, float32, not checkpointed", "stock, bfloat16", "ours, bfloat16")


def main() -> None:
    """Make model and data once, run every variant, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", help="sd15, sd21 or sdxl")
    parser.add_argument("--pixels", type=int, help="a side of the images; the published size if left out")
    parser.add_argument("--pairs", type=int, default=1, help="pairs of the step")
    parser.add_argument("--steps", type=int, default=1, help="timed steps, after one that is not")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="all if left out")
    parser.add_argument("--folder", type=Path, help="for model and data, which are kept; a temporary one if left out")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measure(options.variant[0], options.folder, options.pairs, options.steps)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        making = Process(target=prepare, args=(options.model, folder, options.pixels, options.pairs))  # its memory goes with it
        making.start()
        making.join()
        table(options, folder)


def table(options: argparse.Namespace, folder: Path) -> None:
    """Run every variant in a process of its own and print its row at once."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.environ.get('OMP_NUM_THREADS', 'all')} threads"
    )
    pixels = json.loads((folder / "model" / "unet" / "config.json").read_text())["sample_size"] * 8
    print(f"{options.model}, {pixels} px, {options.pairs} pairs a step; {device}, {platform.machine()}; commit {commit}")
    print(f"{'variant':<34}{'s/step':>8}{'speed':>8}{'peak GB':>9}{'memory':>8}{'loading GB':>12}{'estimated GB':>14}", flush=True)
    first: dict[str, Any] = {}
    for variant in options.variant or VARIANTS:
        command = [sys.executable, __file__, "--inside", "--variant", variant, "--folder", str(folder)]
        command += ["--pairs", str(options.pairs), "--steps", str(options.steps)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        first = first or found
        speed, memory = first["seconds"] / found["seconds"], found["peak"] / first["peak"]
        guess = f"{'-':>14}" if variant.startswith("stock") else f"{estimated(variant, folder, options.pairs):>14.2f}"
        print(
            f"{variant:<34}{found['seconds']:>8.1f}{speed:>7.2f}x{found['peak']:>9.2f}{memory:>7.2f}x{found['loading']:>12.2f}{guess}"
        )
        sys.stdout.flush()


def prepare(name: str, folder: Path, pixels: int | None, pairs: int) -> None:
    """The random model and a cache of noise images, unless they are there."""
    import torch

    from valign.models.diffusion.loading import CLASSES, empty_network
    from valign.models.diffusion.published import PUBLISHED, write_configs

    if not (folder / "data").exists():
        model = write_configs(name, folder / "model", sample_size=pixels // 8 if pixels else None)
        for part in (part for part in PUBLISHED[name][1] if part in CLASSES):
            network = empty_network(model, part, torch.float16).to_empty(device="cpu")
            fill(network)
            network.save_pretrained(model / part)
            del network
            gc.collect()
        make_data(model, folder / "data", pairs)


def fill(network: Any) -> None:
    """Random weights of about the size that layers start with, cut from one block of noise: no time is spent on drawing them."""
    import torch

    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).half()
    with torch.no_grad():
        for parameter in network.parameters():
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(noise)):
                flat[start : start + len(noise)] = noise[: len(flat) - start]
            if parameter.ndim > 1:
                parameter.mul_(0.5 / (parameter.numel() / parameter.shape[0]) ** 0.5)
            else:
                parameter.fill_(float(parameter.shape[0] > 1))
        for name, buffer in network.named_buffers():
            buffer.copy_(
                torch.arange(buffer.numel()).view(buffer.shape) if name.endswith("position_ids") else torch.zeros_like(buffer)
            )
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()


def measure(variant: str, folder: Path, pairs: int, steps: int) -> dict[str, Any]:
    """Seconds of a step, and peaks of memory (10^9 bytes), in this process."""
    import torch

    before = settle()
    make = stock_step if variant.startswith("stock") else our_step
    one_step = make(variant, folder, pairs, steps)
    loading = peak(before)
    reset()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    losses, seconds = [], []
    for _ in range(1 + steps):
        start = clock()
        losses.append(one_step())
        seconds.append(clock() - start)
    assert abs(losses[0] - 0.6931) < 1e-3, f"{variant} must start at ln 2, got {losses[0]}"
    return {"seconds": sum(seconds[1:]) / steps, "peak": peak(before), "loading": loading}


def peak(before: int) -> float:
    """Since the last `reset`, 10^9 bytes beyond the libraries."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()
    return (int(status.split("VmHWM:")[1].split()[0]) * 1024 - before) / 1e9


def reset() -> None:
    """Start the peak anew."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def stock_step(variant: str, folder: Path, pairs: int, steps: int) -> Callable[[], float]:
    """The step of the research example; its autoencoder has the precision of the rest."""
    return stock(str(folder / "model"), folder / "data", pairs, dtype=variant.split(", ")[1])


def estimated(variant: str, folder: Path, pairs: int) -> float:
    """What `valign estimate` says of our step, 10^9 bytes without the libraries."""
    import torch

    from valign.models.diffusion.sketch import Sketch
    from valign.recipes.footprints import DiffusionPhases

    config = our_config(variant, pairs)
    sketch = Sketch(folder=folder / "model", precision=config.memory.precision)
    phases = DiffusionPhases(sketch=sketch, memory=config.memory, cuda=torch.cuda.is_available())
    return phases.training(config).memory / 1e9


def our_config(variant: str, pairs: int) -> Any:
    """Of the training that is measured."""
    from valign.memory import MemoryConfig
    from valign.training import PreferenceConfig

    checkpointed = "not" not in variant
    memory = MemoryConfig(precision=variant.split(", ")[1], gradient_checkpointing=checkpointed, phased=True)  # type: ignore[arg-type]
    return PreferenceConfig(
        flip=False,
        memory=memory,
        pairs_per_step=pairs,
        precompute_ref_draws=1,
        empty_prompt_prob=0.0,
        val_fraction=0.0,
        warmup_steps=0,
    )


def our_step(variant: str, folder: Path, pairs: int, steps: int) -> Callable[[], float]:
    """The step of `valign train alignguard`, by its own loop."""
    from valign.data.images.latents import open_latents
    from valign.memory import AUTOCAST
    from valign.models.diffusion.loading import load_model
    from valign.objectives import DiffusionDPO
    from valign.training.engine.loop import TrainingLoop
    from valign.training.engine.processes import start_processes
    from valign.training.tasks.preference.denoiser_adapter import DenoiserAdapter
    from valign.training.tasks.preference.pair_step import PairStep
    from valign.training.tasks.preference.task import PreferenceTask

    config = our_config(variant, pairs)
    model, cache = load_model(folder / "model", memory=config.memory), open_latents(folder / "data")
    accelerator = start_processes(mixed_precision=AUTOCAST[config.memory.precision])
    trainable = DenoiserAdapter(model, config)
    trainable.attach()
    step = PairStep(model, DiffusionDPO(), config, accelerator, trainable.off)
    task = PreferenceTask(step, cache, cache.rows(), folder / "run", None, "train", trainable)
    loop, numbers = TrainingLoop(task, accelerator), iter(range(1 + steps))
    return lambda: loop.train_step(next(numbers))["loss"]


if __name__ == "__main__":
    main()
