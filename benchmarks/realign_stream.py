"""How fast and in how much memory does a whole model stream through a realignment?

    python benchmarks/realign_stream.py --work /tmp/stream

Three models of Stable Diffusion 1.5's U-Net in float16, random values, in shards; RESTA writes a fourth. Beside it stands the
speed at which the same files are read. Seconds are of the clock, on one thread; memory is the peak of the process above what it
held after the imports (Linux).
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

import torch

SHARD = 500_000_000


def unet_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the U-Net, from its architecture alone."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}


def make(work: Path) -> None:
    """Base, aligned, fine-tuned."""
    from valign.files import write_json
    from valign.models.files.tensor_stream import TensorShape
    from valign.models.files.weight_files import write_shards

    shapes = {name: TensorShape(torch.float16, shape) for name, shape in sorted(unet_shapes().items())}
    for number, model in enumerate(("base", "aligned", "tuned")):
        folder = work / model
        if (folder / "config.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        random = torch.Generator().manual_seed(number)
        values = (0.02 * torch.randn(max(torch.Size(known.shape).numel() for known in shapes.values()), generator=random)).half()
        write_shards(
            folder,
            "diffusion_pytorch_model",
            shapes,
            lambda name: values[: torch.Size(shapes[name].shape).numel()].reshape(shapes[name].shape),  # noqa: B023
            limit=SHARD,
        )
        write_json(folder / "config.json", {"_class_name": "UNet2DConditionModel"})


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


def realigned(work: Path) -> dict[str, float]:
    """Seconds, bytes read and written, peak memory."""
    from valign.merging.realign import Resta, open_realignment, realign

    torch.set_num_threads(1)
    shutil.rmtree(work / "out", ignore_errors=True)
    forget(work)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.perf_counter()
    opened = open_realignment(work / "base", work / "aligned", [work / "tuned"])
    realign(Resta(), opened, work / "out", name="resta", shard_size=SHARD)
    return {"seconds": time.perf_counter() - start, "megabytes": memory("VmHWM") - before}


def read_all(work: Path) -> float:
    """Seconds to read the three inputs, and nothing else."""
    forget(work)
    start = time.perf_counter()
    for model in ("base", "aligned", "tuned"):
        for file in sorted((work / model).glob("*.safetensors")):
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 22):
                    pass
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--one", action="store_true", help="measure in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(realigned(args.work)))
        return
    make(args.work)
    size = sum(file.stat().st_size for file in (args.work / "tuned").glob("*.safetensors"))
    largest = max(torch.Size(shape).numel() for shape in unet_shapes().values()) * 2
    done = subprocess.run(
        [sys.executable, __file__, "--work", str(args.work), "--one"], stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    reading = read_all(args.work)
    print(f"each model {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.1f} MB in float16")
    print(f"reading the three inputs: {reading:.1f} s, {3 * size / reading / 1e6:.0f} MB/s")
    print(
        f"resta, reading and writing: {found['seconds']:.1f} s, {3 * size / found['seconds'] / 1e6:.0f} MB/s read "
        f"({reading / found['seconds']:.0%} of the plain reading), peak memory {found['megabytes']:.0f} MB"
    )


if __name__ == "__main__":
    main()
