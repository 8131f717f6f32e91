"""Merges stream: their memory is that of one module, not of the adapters. Measured in a fresh process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from valign.models.files.adapter_files import WEIGHTS, LoraFactors, save_adapter

MODULES, WIDTH, RANK = 100, 1024, 64  # half a megabyte of factors per module, 52 MB per adapter

SCRIPT = """
import re, sys, torch
from pathlib import Path
from valign.merging import MERGES, Expert, MergeContext, Votes, merge_metadata, write_merge
from valign.models.files.adapter_files import open_adapter, save_adapter
torch.set_num_threads(1)
slug, out, *folders = sys.argv[1:]
small = [Expert(Path(f).name, open_adapter(f)) for f in folders]
module = small[0].file.modules[0]
def merge(experts, modules):
    options = {}
    if slug == "co-merge":
        counts = {m: torch.arange(len(experts))[:, None].expand(-1, 1024) for m in modules}
        options = {"votes": Path(out).parent / "votes"}
        Votes.from_counts([e.name for e in experts], counts).save(options["votes"])
    if slug == "best-single":
        options = {"scores": {e.name: 1.0 for e in experts}}
    return MERGES[slug](**options)(experts, MergeContext())
def memory(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
next(iter(merge(small, small[0].file.modules)))  # every library is loaded and warm, one module has been through
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: that of the imports would hide ours
before = memory("VmRSS")
write_merge(merge(small, small[0].file.modules), Path(out), merge_metadata(slug, small, {}))
print(memory("VmHWM") - before)
"""


def wide_adapter(folder, seed):
    """Written as a stream as well, or this test would need the memory that it forbids."""
    g = torch.Generator().manual_seed(seed)
    stream = (
        (f"m{i:03d}", LoraFactors(torch.randn(RANK, WIDTH, generator=g), torch.randn(WIDTH, RANK, generator=g), 1.0))
        for i in range(MODULES)
    )
    save_adapter(folder, stream, metadata={})
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("slug", ["sum", "mean", "co-merge", "best-single"])
def test_peak_memory_is_that_of_a_module(slug, tmp_path):
    folders = [wide_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    adapters_mb = sum((folder / WEIGHTS).stat().st_size for folder in folders) / 2**20
    assert adapters_mb > 99
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, slug, tmp_path / "out", *folders], capture_output=True, text=True, check=True
    )
    grown = float(done.stdout.split()[-1])
    assert grown < 12  # a few copies of one module's factors, and the allocator's slack; adapters and result are 200 MB together
