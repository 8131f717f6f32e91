"""How fast and in how much memory does a whole model stream through a realignment, beside mergekit and a merge in memory?

    python benchmarks/realign_stream.py --work runs/stream --mergekit MERGEKIT_VENV/bin/python

Three models of Stable Diffusion 1.5's U-Net in float16, random values; RESTA writes a fourth, and so do mergekit (the same sum as
its task arithmetic) and a script that loads all three. Beside them stands the speed at which the same files are read. Each runs in
a process of its own on one thread. Seconds are of the clock and of the processor; memory is the peak above what the process held
after its imports (Linux). Then TIES and DARE are compared entry by entry with mergekit's on the same tensors.

``--mergekit`` is the Python of an environment that has mergekit (LGPL, so it is no dependency); without it its rows are left out.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

SHARD = 500_000_000  # bytes of the written files
MODELS = ("base", "aligned", "tuned")
FILE = "diffusion_pytorch_model.safetensors"
STRENGTH = 0.5


def unet_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the U-Net, from its architecture alone."""
    from diffusers import UNet2DConditionModel

    widths = tuple(channels * factor for factor in (1, 2, 4, 4))
    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=widths, cross_attention_dim=768, attention_head_dim=8)
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}


def make(work: Path, channels: int) -> int:
    """Base, aligned, fine-tuned; returns the bytes of the largest tensor."""
    from valign.files import write_json
    from valign.models.files.tensor_stream import TensorShape
    from valign.models.files.weight_files import write_shards

    shapes = {name: TensorShape(torch.float16, shape) for name, shape in sorted(unet_shapes(channels).items())}
    largest = max(known.size for known in shapes.values())
    for number, model in enumerate(MODELS):
        folder = work / model
        if (folder / "config.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        random = torch.Generator().manual_seed(number)
        values = (0.02 * torch.randn(largest // 2, generator=random)).half()

        def first(name: str, values: torch.Tensor = values) -> torch.Tensor:
            shape = shapes[name].shape
            return values[: torch.Size(shape).numel()].reshape(shape)

        write_shards(folder, "diffusion_pytorch_model", shapes, first, limit=10**12)
        write_json(folder / "config.json", {"_class_name": "UNet2DConditionModel"})
    return largest


def forget(work: Path) -> None:
    """Ask the system to drop the files from its cache, so that they come from the disk."""
    for file in work.rglob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory(what: str) -> float:
    """A line of Linux's process status, MB."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def streamed(work: Path) -> Any:
    """RESTA by `valign realign`."""
    from valign.merging.realign import Resta, open_realignment, realign

    def run() -> None:
        opened = open_realignment(work / "base", work / "aligned", [work / "tuned"])
        realign(Resta(strength=STRENGTH), opened, work / "out-valign", name="resta", shard_size=SHARD)

    return run


def loaded(work: Path) -> Any:
    """The same sum with all three models in memory."""
    from safetensors.torch import load_file, save_file

    def run() -> None:
        base, aligned, tuned = (load_file(work / model / FILE) for model in MODELS)
        made = {name: (tuned[name].float() + STRENGTH * (aligned[name].float() - base[name].float())).half() for name in tuned}
        (work / "out-loaded").mkdir()
        save_file(made, work / "out-loaded" / FILE)

    return run


def mergekits(work: Path) -> Any:
    """The same sum as mergekit's task arithmetic around the fine-tuned model: weights that add up to 0."""
    from mergekit.graph import Executor
    from mergekit.options import MergeOptions
    from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge

    base, aligned, tuned = (str(work / model / FILE) for model in MODELS)
    config = RawPyTorchMergeConfig(
        merge_method="task_arithmetic",
        base_model=tuned,
        models=[
            {"model": aligned, "parameters": {"weight": STRENGTH}},
            {"model": base, "parameters": {"weight": -STRENGTH}},
        ],
        parameters={"normalize": False},
        dtype="float32",
        out_dtype="float16",
    )

    def run() -> None:
        options = MergeOptions(out_shard_size=SHARD)
        Executor(plan_flat_merge(config, str(work / "out-mergekit"), False, False, options), math_device="cpu").execute()

    return run


WAYS = {"valign": streamed, "mergekit": mergekits, "loaded": loaded}


def measured(way: str, work: Path) -> dict[str, float]:
    """Seconds and peak memory, in this process."""
    torch.set_num_threads(1)
    shutil.rmtree(work / f"out-{way}", ignore_errors=True)
    run = WAYS[way](work)
    forget(work)
    Path("/proc/self/clear_refs").write_text("5")
    before, start, busy = memory("VmRSS"), time.perf_counter(), time.process_time()
    run()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return {"seconds": seconds, "processor": busy, "megabytes": memory("VmHWM") - before}


def read_all(work: Path) -> dict[str, float]:
    """Seconds to read the three inputs, and nothing else."""
    forget(work)
    start, busy = time.perf_counter(), time.process_time()
    for model in MODELS:
        for file in sorted((work / model).glob("*.safetensors")):
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 22):
                    pass
    return {"seconds": time.perf_counter() - start, "processor": time.process_time() - busy}


def differences(work: Path) -> dict[str, float]:
    """Largest differences to mergekit's TIES and DARE on one weight of three models, as a share of the largest entry."""
    from mergekit.graph import Executor
    from mergekit.options import MergeOptions
    from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge
    from safetensors.torch import load_file, save_file

    from valign.merging.dare_ties import drop
    from valign.merging.ties import elect, trim

    random, weights, density, shape = torch.Generator().manual_seed(0), (1.0, 0.7, 1.3), 0.2, (320, 640)
    changes = [torch.randn(shape, generator=random) for _ in weights]
    place = work / "elements"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    save_file({"w": torch.zeros(shape)}, place / "base.safetensors")
    for number, change in enumerate(changes):
        save_file({"w": change}, place / f"{number}.safetensors")

    def theirs(method: str) -> torch.Tensor:
        config = RawPyTorchMergeConfig(
            merge_method=method,
            base_model=str(place / "base.safetensors"),
            models=[
                {"model": str(place / f"{number}.safetensors"), "parameters": {"weight": weight, "density": density}}
                for number, weight in enumerate(weights)
            ],
            parameters={"normalize": method == "ties"},
            dtype="float32",
        )
        Executor(plan_flat_merge(config, str(place / method), False, False, MergeOptions()), math_device="cpu").execute()
        return load_file(next((place / method).glob("*.safetensors")))["w"]

    def away(ours: torch.Tensor, other: torch.Tensor) -> float:
        return float((ours - other).abs().max() / other.abs().max())

    found = {"ties": away(elect(lambda: ((w, trim(c, density)) for w, c in zip(weights, changes)), "weights"), theirs("ties"))}
    seeds = (101, 102, 103)  # others than the changes', whose draws they would repeat
    draws = [torch.rand(shape, generator=torch.Generator().manual_seed(number)) for number in seeds]
    left, plain = iter(draws), torch.bernoulli
    torch.bernoulli = lambda probabilities: (next(left) < probabilities).to(probabilities.dtype)  # type: ignore[assignment]
    try:
        other = theirs("dare_linear")
    finally:
        torch.bernoulli = plain
    kept = [drop(change, density, torch.Generator().manual_seed(number)) for number, change in zip(seeds, changes)]
    found["dare"] = away(sum(w * c for w, c in zip(weights, kept)), other)  # type: ignore[arg-type]
    same = [
        c * float(change.abs().sum() / c.abs().sum()) for c, change in zip(kept, changes)
    ]  # mergekit keeps the sum of magnitudes
    found["dare, rescaled as mergekit does"] = away(sum(w * c for w, c in zip(weights, same)), other)  # type: ignore[arg-type]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--channels", type=int, default=320, help="of the first block; 320 is Stable Diffusion 1.5, 64 a quick look"
    )
    parser.add_argument("--mergekit", default="", help="Python of an environment with mergekit")
    parser.add_argument("--one", default="", help="measure one of them in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(differences(args.work) if args.one == "differences" else measured(args.one, args.work)))
        return
    largest = make(args.work, args.channels)
    size = (args.work / "tuned" / FILE).stat().st_size

    def ask(one: str, python: str = sys.executable) -> dict[str, float]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run(
            [python, __file__, "--work", str(args.work), "--one", one],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=environment,
        )
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    print(f"each model {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.1f} MB in float16", flush=True)
    reading = read_all(args.work)
    print(
        f"reading the three: {reading['seconds']:.1f} s ({reading['processor']:.1f} s of the processor), "
        f"{3 * size / reading['seconds'] / 1e6:.0f} MB/s",
        flush=True,
    )
    for way in WAYS:
        if way == "mergekit" and not args.mergekit:
            continue
        found = ask(way, args.mergekit if way == "mergekit" else sys.executable)
        speed, share = 3 * size / found["seconds"] / 1e6, reading["seconds"] / found["seconds"]
        print(
            f"{way}: {found['seconds']:.1f} s ({found['processor']:.1f} s of the processor), {speed:.0f} MB/s read ({share:.0%} of "
            f"the plain reading), peak memory {found['megabytes']:.0f} MB",
            flush=True,
        )
        shutil.rmtree(args.work / f"out-{way}", ignore_errors=True)
    if args.mergekit:
        print(f"largest relative difference to mergekit: {ask('differences', args.mergekit)}")


if __name__ == "__main__":
    main()
