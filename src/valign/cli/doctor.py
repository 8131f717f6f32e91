"""``valign doctor``: is everything here that the other commands need?"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from valign.checks import UserError
from valign.cli.common import example, out

State = Literal["ok", "optional", "missing"]
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One row: ``missing`` is needed and fails the check, ``optional`` is good to know."""

    name: str
    state: State
    detail: str


@example("valign doctor --json")
def command(json: Annotated[bool, typer.Option("--json", help="as JSON")] = False) -> None:
    """Show versions, device, models found and writable folders. Exit code 1 if something needed is missing."""
    findings = [*packages(), *devices(), *bundled_models(), *cached_models(), *own_detectors(), *folders()]
    if json:
        from json import dumps

        typer.echo(dumps([asdict(finding) for finding in findings], indent=2))
    else:
        out.print(_table(findings))
    missing = [finding.name for finding in findings if finding.state == "missing"]
    if missing and not json:
        out.print(Text(f"Mend this first: {', '.join(missing)}.", style="red"))
    raise typer.Exit(1 if missing else 0)


def packages() -> Iterator[Finding]:
    """Python, every package that valign requires, and the extras."""
    from packaging.requirements import Requirement

    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok" if sys.version_info >= (3, 11) else "missing", f"{python} (3.11 or later is needed)")
    for requirement in map(Requirement, requires("valign") or ()):
        extra = _extra(str(requirement.marker or ""))
        found = _version(requirement.name)
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        state: State = "ok" if fits else "optional" if extra else "missing"
        install = f"pip install 'valign[{extra}]'" if extra else f"pip install '{requirement.name}{requirement.specifier}'"
        detail = found if fits else f"{found or 'not installed'}; {install}"
        yield Finding(f"{requirement.name} [{extra}]" if extra else requirement.name, state, str(detail))


def devices() -> Iterator[Finding]:
    """Processor, threads, memory of each accelerator."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("processor", "ok", f"{cores} cores, torch uses {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield Finding(f"cuda:{index}", "ok", f"{card.name}, {card.total_memory / GIB:.0f} GiB")
    if not torch.cuda.is_available():
        yield Finding("cuda", "optional", "none found: enough for the bundled model, slow for full-size models")


def bundled_models() -> Iterator[Finding]:
    """The shapes world's weights, which come with the package."""
    from valign.worlds.shapes import clip_folder, model_folder, oracle_folder

    for name, find in (("pipeline", model_folder), ("oracle", oracle_folder), ("CLIP", clip_folder)):
        try:
            folder = find()
        except UserError as error:
            yield Finding(f"shapes {name}", "missing", str(error))
            continue
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        detail = f"{size / 2**20:.1f} MiB in {folder}" if size else f"no weights in {folder}; install valign again"
        yield Finding(f"shapes {name}", "ok" if size else "missing", detail)


def cached_models() -> Iterator[Finding]:
    """Diffusers pipelines in the local cache of the Hugging Face hub, which load without network."""
    from huggingface_hub.constants import HF_HUB_CACHE

    indices = sorted(Path(HF_HUB_CACHE).glob("models--*/snapshots/*/model_index.json"))
    names = sorted({index.parents[2].name.removeprefix("models--").replace("--", "/") for index in indices})
    yield Finding("hub cache", "ok" if names else "optional", ", ".join(names) or f"no pipelines in {HF_HUB_CACHE}")


def own_detectors() -> Iterator[Finding]:
    """Detectors that are called by name alone. One that cannot be read is named, and stops nothing."""
    from valign.detectors import on_shelf, shelf
    from valign.detectors.record import read_record

    found = []
    for place in on_shelf():
        try:
            found.append(f"{place.name} ({read_record(place).kind})")
        except UserError as error:
            found.append(f"{place.name}: {error}")
    yield Finding("own detectors", "ok" if found else "optional", ", ".join(found) or f"none in {shelf()}; valign detector fit")


def folders() -> Iterator[Finding]:
    """Where runs and temporary files go."""
    for name, folder in (("current folder", Path.cwd()), ("temporary folder", Path(tempfile.gettempdir()))):
        writable = os.access(folder, os.W_OK)
        free = shutil.disk_usage(folder).free / GIB
        detail = f"{folder}, {free:.1f} GiB free" if writable else f"{folder} is not writable; run valign elsewhere"
        yield Finding(name, "ok" if writable else "missing", detail)


def _extra(marker: str) -> str:
    return marker.partition("extra == ")[2].strip("\"'")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _table(findings: list[Finding]) -> Table:
    signs = {"ok": Text("ok", "green"), "optional": Text("optional", "yellow"), "missing": Text("missing", "red")}
    table = Table("", "what", "found")
    for finding in findings:
        table.add_row(signs[finding.state], Text(finding.name), Text(finding.detail, overflow="fold"))
    return table
