"""What does a merge of seven experts of Stable Diffusion 1.5's size cost, in seconds and in memory?

    python benchmarks/merge.py [MERGE ...]

From adapter files on disk to a merged adapter file on disk, on one thread; every row in a process of its own, with seconds of CPU
time and the peak of resident memory above that after the imports (Linux). The alternatives do the same work in the same run: peft's
`add_weighted_adapter` (on a model with the 128 linear layers), and dense changes of all experts at once. Where two rows claim the
same merge, their results are compared before they are printed.
"""

import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

EXPERTS, RANK, DENSITY = 7, 4, 0.5
ROWS = (  # merge, who does it; the first of each merge is the one that the others are divided by
    ("mean", "valign"),
    ("mean", "peft cat"),
    ("mean", "peft svd"),
    ("mean", "dense, all at once"),
    ("sum", "valign"),
    ("co-merge", "valign"),
    ("co-merge", "dense, all at once"),
    ("ties", "valign"),
    ("ties", "peft ties_svd"),
    ("dare-ties", "valign"),
    ("dare-ties", "peft dare_ties_svd"),
    ("best-single", "valign"),
)


def shapes() -> dict[str, tuple[int, int]]:
    """The attention layers of SD 1.5's U-Net, from its architecture alone."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    return {name: tuple(layer.weight.shape) for name, layer in unet.named_modules() if name.endswith(targets)}


def make_experts(folder: Path) -> None:
    """Experts that share their start and differ in what they learned, as `valign train` makes them."""
    import torch

    from valign.models.files.adapter_files import LoraFactors, save_adapter

    for i in range(EXPERTS):
        shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + i)
        factors = {
            name: LoraFactors(torch.randn(RANK, fan_in, generator=shared) / RANK, 0.01 * torch.randn(o, RANK, generator=own), 1.0)
            for name, (o, fan_in) in shapes().items()
        }
        save_adapter(folder / f"expert_{i}", factors, metadata={"family": "stable-diffusion"})


def even_winners(fan_out: int) -> Any:
    """A stand-in for the votes: the experts take turns, row by row. (Calibration is a pass of the model, not part of a merge.)"""
    import torch

    return torch.arange(fan_out) % EXPERTS


def by_valign(merge: str, folder: Path, out: Path) -> None:
    import torch

    from valign.merging import MERGES, Expert, merge_metadata, write_merge
    from valign.models.files.adapter_files import open_adapter

    experts = [Expert(f"expert_{i}", open_adapter(folder / f"expert_{i}")) for i in range(EXPERTS)]
    arguments: tuple[Any, ...] = ()
    if merge == "co-merge":
        one_hot = torch.nn.functional.one_hot
        entries = experts[0].file.entries
        arguments = ({name: one_hot(even_winners(entry.shape[0]), EXPERTS).T for name, entry in entries.items()},)
    if merge == "best-single":
        arguments = ({expert.name: float(i) for i, expert in enumerate(experts)},)
    options = {"density": DENSITY} if "ties" in merge else {}
    write_merge(MERGES[merge](experts, *arguments, **options), out, merge_metadata(merge, experts, options))


def by_peft(combination: str, folder: Path, out: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    from valign.models.files.adapter_files import WEIGHTS, LoraFactors, save_adapter

    layers = {name: torch.nn.Linear(i, o, bias=False) for name, (o, i) in shapes().items()}
    model = torch.nn.ModuleDict({name.replace(".", "_"): layer for name, layer in layers.items()})
    names = {name.replace(".", "_"): name for name in layers}
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(names))
    adapted = get_peft_model(model, config, adapter_name="expert_0")
    for i in range(EXPERTS):
        if i:
            adapted.add_adapter(f"expert_{i}", config)
        tensors = load_file(folder / f"expert_{i}" / WEIGHTS)
        for key, name in names.items():
            layer = adapted.base_model.model[key]
            layer.lora_A[f"expert_{i}"].weight.data = tensors[f"unet.{name}.lora_A.weight"]
            layer.lora_B[f"expert_{i}"].weight.data = tensors[f"unet.{name}.lora_B.weight"]
    options: dict[str, Any] = {} if combination == "cat" else {"svd_rank": EXPERTS * RANK}
    if "ties" in combination:
        options["density"] = DENSITY
        torch.manual_seed(0)
    # cat and svd weigh each expert; ties and dare_ties divide by the number of agreeing experts themselves
    weights = [1.0 if "ties" in combination else 1 / EXPERTS] * EXPERTS
    adapted.add_weighted_adapter([f"expert_{i}" for i in range(EXPERTS)], weights, "merged", combination, **options)
    merged = {}
    for key, name in names.items():
        layer = adapted.base_model.model[key]
        down, up = layer.lora_A["merged"].weight.detach(), layer.lora_B["merged"].weight.detach()
        merged[name] = LoraFactors(down, up, layer.scaling["merged"])
    save_adapter(out, merged, metadata={})


def dense(merge: str, folder: Path, out: Path) -> None:
    import torch

    from valign.merging.compress import compress_dense
    from valign.models.files.adapter_files import open_adapter, save_adapter

    deltas = [{name: lora.delta() for name, lora in open_adapter(folder / f"expert_{i}").items()} for i in range(EXPERTS)]
    merged = {}
    for name in deltas[0]:
        stack = torch.stack([delta[name] for delta in deltas])
        rows = torch.arange(stack.shape[1])
        merged[name] = stack.mean(0) if merge == "mean" else stack[even_winners(stack.shape[1]), rows]
    save_adapter(out, {name: compress_dense(delta, EXPERTS * RANK)[0] for name, delta in merged.items()}, metadata={})


def measure(merge: str, who: str, folder: Path, out: Path) -> dict[str, float]:
    """Run one row in this process, after the imports that everybody needs."""
    import torch

    for module in ("diffusers.models.unets.unet_2d_condition", "peft", "valign.merging"):
        import_module(module)
    torch.set_num_threads(1)
    torch.linalg.svd(torch.eye(8))
    shapes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: that of the imports would hide this one's
    before, start = memory("VmRSS"), time.process_time()
    if who == "valign":
        by_valign(merge, folder, out)
    elif who.startswith("peft"):
        by_peft(who.split()[1], folder, out)
    else:
        dense(merge, folder, out)
    return {"seconds": time.process_time() - start, "megabytes": memory("VmHWM") - before}


def memory(what: str) -> float:
    """A line of Linux's process status, in megabytes."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def relative_difference(one: Path, other: Path) -> float:
    from valign.models.files.adapter_files import open_adapter

    a, b = open_adapter(one), open_adapter(other)
    gap = sum(float((a.factors(name).delta() - b.factors(name).delta()).square().sum()) for name in a.modules)
    size = sum(float(a.factors(name).delta().square().sum()) for name in a.modules)
    return (gap / size) ** 0.5


def rows(work: Path, wanted: list[str]) -> Iterator[tuple[str, str, dict[str, float], float]]:
    """Every row with what it measured and how far its result lies from valign's."""
    for merge, who in ROWS:
        if wanted and merge not in wanted:
            continue
        out = work / f"{merge} {who}"
        command = [sys.executable, __file__, "--one", merge, who, str(work), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        yield merge, who, json.loads(done.stdout.splitlines()[-1]), relative_difference(work / f"{merge} valign", out)


def main() -> None:
    if "--one" in sys.argv:
        merge, who, work, out = sys.argv[2:]
        print(json.dumps(measure(merge, who, Path(work), Path(out))))
        return
    print(f"{EXPERTS} experts, {len(shapes())} layers, rank {RANK}; 1 thread, {platform.machine()}, {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "peft", "diffusers", "safetensors")))
    print(f"\n{'merge':12} {'by':20} {'seconds':>8} {'ratio':>7} {'peak MB':>8} {'ratio':>7}  difference")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_experts(work)
        ours: dict[str, dict[str, float]] = {}
        for merge, who, found, difference in rows(work, sys.argv[1:]):
            base = ours.setdefault(merge, found)
            # exact merges agree; ties differs a little (peft trims to an exact count), dare_ties draws other masks
            assert merge not in ("mean", "co-merge") or difference < 1e-4, (merge, who, difference)
            time_ratio, memory_ratio = found["seconds"] / base["seconds"], found["megabytes"] / max(base["megabytes"], 1)
            print(
                f"{merge:12} {who:20} {found['seconds']:8.2f} {time_ratio:6.1f}x {found['megabytes']:8.0f} {memory_ratio:6.1f}x"
                f"  {difference:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
