"""What does a merge of seven experts of Stable Diffusion 1.5's and SDXL's size cost, in seconds and in memory?

    python benchmarks/merge.py [MERGE ...]

From adapter files on disk to a merged adapter file on disk, on one thread; every row in a process of its own, with seconds of CPU
time and the peak of resident memory above that after the imports (Linux). The alternatives do the same work in the same run: peft's
`add_weighted_adapter` (on a model with the 128 linear layers), and dense changes of all experts at once. Where two rows claim the
same merge, their results are compared before they are printed. Second moments and votes are stand-ins of the right size:
calibration is a pass of the model, not part of a merge.
"""

import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

EXPERTS, RANK, DENSITY = 7, 4, 0.5
SETS = {  # name -> family, and the layers that the experts adapt
    "sd": ("sd", ("to_q", "to_k", "to_v", "to_out.0")),
    "sd-text": ("sd", ("attn2.to_k", "attn2.to_v")),
    "sdxl-text": ("sdxl", ("attn2.to_k", "attn2.to_v")),
    "sdxl": ("sdxl", ("to_q", "to_k", "to_v", "to_out.0")),  # no row: its second moments do not fit into a small machine
}
ROWS = (  # experts, merge, who does it; the first of each merge of a set is the one that the others are divided by
    ("sd", "mean", "valign"),
    ("sd", "mean", "peft cat"),
    ("sd", "mean", "peft svd"),
    ("sd", "mean", "dense, all at once"),
    ("sd", "sum", "valign"),
    ("sd", "co-merge", "valign"),
    ("sd", "co-merge", "dense, all at once"),
    ("sd", "ties", "valign"),
    ("sd", "ties", "peft ties_svd"),
    ("sd", "dare-ties", "valign"),
    ("sd", "dare-ties", "peft dare_ties_svd"),
    ("sd", "best-single", "valign"),
    ("sd", "regmean", "valign"),
    ("sd-text", "sum", "valign"),
    ("sd-text", "co-merge", "valign"),
    ("sd-text", "regmean", "valign"),
    ("sdxl-text", "sum", "valign"),
    ("sdxl-text", "co-merge", "valign"),
    ("sdxl-text", "regmean", "valign"),
)


@cache
def shapes(experts: str) -> dict[str, tuple[int, int]]:
    """Layers of a set of experts, from the U-Net's architecture alone."""
    import torch
    from diffusers import UNet2DConditionModel

    family, targets = SETS[experts]
    with torch.device("meta"):
        if family == "sd":
            unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        else:
            unet = UNet2DConditionModel(
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                cross_attention_dim=2048,
                attention_head_dim=(5, 10, 20),
                use_linear_projection=True,
            )
    return {name: tuple(layer.weight.shape) for name, layer in unet.named_modules() if name.endswith(targets)}


def make_experts(experts: str, folder: Path) -> None:
    """Experts that share their start and differ in what they learned, as `valign train` makes them."""
    import torch

    from valign.models.files.adapter_files import LoraFactors, save_adapter

    for i in range(EXPERTS):
        shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + i)
        factors = {
            name: LoraFactors(torch.randn(RANK, fan_in, generator=shared) / RANK, 0.01 * torch.randn(o, RANK, generator=own), 1.0)
            for name, (o, fan_in) in shapes(experts).items()
        }
        save_adapter(folder / f"expert_{i}", factors, metadata={"family": "stable-diffusion"})


def even_winners(fan_out: int) -> Any:
    """A stand-in for the votes: the experts take turns, row by row. (Calibration is a pass of the model, not part of a merge.)"""
    import torch

    return torch.arange(fan_out) % EXPERTS


def stand_in_moments(names: list[str], widths: dict[str, int]) -> list[dict[str, Any]]:
    """Second moments of twice as many random inputs as a layer has, for seven experts and the captions; shared as in a model."""
    import torch

    from valign.models.diffusion.text_states import TEXT_READERS

    groups: list[dict[str, Any]] = []
    for group in range(EXPERTS + 1):
        g, known, found = torch.Generator().manual_seed(group), {}, {}
        for name in names:
            text = name.endswith(TEXT_READERS)
            key = "text" if text else re.sub(r"attn1\.to_[qkv]$", "attn1.", name)
            if key not in known:
                rows = torch.randn(2 * widths[name], widths[name], generator=g)
                known[key] = (rows.T @ rows).double() if text else rows.T @ rows
            found[name] = known[key]
        groups.append(found)
    return groups


def by_valign(merge: str, folder: Path, out: Path, moments: list[dict[str, Any]]) -> None:
    import torch

    from valign.merging import MERGES, Expert, MergeContext, co_merge, merge_metadata, regmean, write_merge
    from valign.models.files.adapter_files import open_adapter

    experts = [Expert(f"expert_{i}", open_adapter(folder / f"expert_{i}")) for i in range(EXPERTS)]
    options: dict[str, Any] = {"density": DENSITY} if "ties" in merge else {}
    if merge == "co-merge":
        one_hot, entries = torch.nn.functional.one_hot, experts[0].file.entries
        stream = co_merge(experts, {name: one_hot(even_winners(entry.shape[0]), EXPERTS).T for name, entry in entries.items()})
    elif merge == "regmean":
        stream = regmean(experts, moments[:-1], moments[-1])
    else:
        given = {"scores": {expert.name: float(i) for i, expert in enumerate(experts)}} if merge == "best-single" else {}
        stream = MERGES[merge](**options, **given)(experts, MergeContext())
    write_merge(stream, out, merge_metadata(merge, experts, options))


def by_peft(combination: str, folder: Path, out: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    from valign.models.files.adapter_files import WEIGHTS, LoraFactors, save_adapter

    layers = {name: torch.nn.Linear(i, o, bias=False) for name, (o, i) in shapes("sd").items()}
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


def measure(experts: str, merge: str, who: str, folder: Path, out: Path) -> dict[str, float]:
    """Run one row in this process, after the imports that everybody needs. Memory counts the second moments that a merge holds."""
    import torch

    for module in ("diffusers.models.unets.unet_2d_condition", "peft", "valign.merging"):
        import_module(module)
    torch.set_num_threads(1)
    torch.linalg.svd(torch.eye(8))
    widths = {name: fan_in for name, (_, fan_in) in shapes(experts).items()}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: that of the imports would hide this one's
    before = memory("VmRSS")
    moments = stand_in_moments(sorted(widths), widths) if merge == "regmean" else []
    start = time.process_time()
    if who == "valign":
        by_valign(merge, folder, out, moments)
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


def rows(work: Path, wanted: list[str]) -> Iterator[tuple[str, str, str, dict[str, float], float]]:
    """Every row with what it measured and how far its result lies from valign's."""
    for experts, merge, who in ROWS:
        if wanted and merge not in wanted:
            continue
        folder = work / experts
        if not folder.exists():
            make_experts(experts, folder)
        out = folder / f"{merge} {who}"
        command = [sys.executable, __file__, "--one", experts, merge, who, str(folder), str(out)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        yield experts, merge, who, json.loads(done.stdout.splitlines()[-1]), relative_difference(folder / f"{merge} valign", out)


def main() -> None:
    from valign.merging.moments import moment_bytes

    if "--one" in sys.argv:
        experts, merge, who, folder, out = sys.argv[2:]
        print(json.dumps(measure(experts, merge, who, Path(folder), Path(out))))
        return
    layers = ", ".join(f"{name} {len(shapes(name))} layers" for name in SETS)
    print(f"{EXPERTS} experts of rank {RANK}: {layers}; 1 thread, {platform.machine()}, {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "peft", "diffusers", "safetensors")))
    held = {name: moment_bytes({one: fan_in for one, (_, fan_in) in shapes(name).items()}, groups=EXPERTS + 1) for name in SETS}
    print("second moments of regmean:", ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in held.items()))
    print(f"\n{'experts':10} {'merge':12} {'by':20} {'seconds':>8} {'ratio':>7} {'peak MB':>8} {'ratio':>7}  difference")
    with tempfile.TemporaryDirectory() as folder:
        ours: dict[tuple[str, str], dict[str, float]] = {}
        for experts, merge, who, found, difference in rows(Path(folder), sys.argv[1:]):
            base = ours.setdefault((experts, merge), found)
            # exact merges agree; ties differs a little (peft trims to an exact count), dare_ties draws other masks
            assert merge not in ("mean", "co-merge") or difference < 1e-4, (merge, who, difference)
            time_ratio, memory_ratio = found["seconds"] / base["seconds"], found["megabytes"] / max(base["megabytes"], 1)
            print(
                f"{experts:10} {merge:12} {who:20} {found['seconds']:8.2f} {time_ratio:6.1f}x {found['megabytes']:8.0f} "
                f"{memory_ratio:6.1f}x  {difference:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
