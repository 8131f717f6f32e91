"""``valign adapter``: look at an adapter, carry it to and from the layout that other tools read."""

from math import sqrt
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.table import Table
from rich.text import Text
from typer import Argument, Option, Typer

from valign.checks import UserError
from valign.cli.common import Anyway, checked, out, there
from valign.cli.early import refuse_other_base, refuse_subject

app = Typer(
    no_args_is_help=True,
    help="Show adapters, fuse them into a model; export and import the kohya layout of ComfyUI and other web interfaces.",
)

TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "BOOL": "bool",
}
SHOWN = ("base", "base_fingerprint", "family", "category", "merge_method", "policy_hash")  # of an adapter's own record


@app.command("show", epilog="example: valign adapter show runs/merged")
def show(
    folder: Annotated[Path, Argument(help="an adapter folder, or a run of `valign train`")],
    json: Annotated[bool, Option("--json", help="everything, module by module, as JSON")] = False,
    norms: Annotated[bool, Option("--norms", help="also by how much it changes the weights; reads them all")] = False,
) -> None:
    """Show what an adapter changes, and where it came from."""
    from valign.models.files.adapter_index import index_adapter
    from valign.models.files.layouts import split_name

    adapter = index_adapter(folder)
    places = adapter.header.places
    modules: dict[str, Any] = {
        module: {
            "shape": list(entry.shape),
            "rank": entry.rank,
            "dtype": TORCH_NAMES[places[entry.down].dtype],
            **({"kernel": list(entry.kernel)} if entry.kernel else {}),
        }
        for module, entry in sorted(adapter.entries.items())
    }
    texts = sum(bool(split_name(module)[0]) for module in modules)
    if norms:
        _add_norms(folder, modules)
    facts: dict[str, Any] = {
        "modules": len(modules),
        **({"of text encoders": texts} if texts else {}),
        "ranks": sorted({entry["rank"] for entry in modules.values()}),
        "parameters": sum(sum(entry["shape"]) * entry["rank"] for entry in modules.values()),
        **({"norm": sqrt(sum(entry["norm"] ** 2 for entry in modules.values()))} if norms else {}),
        "sha256": adapter.fingerprint(),
        **{key: adapter.metadata[key] for key in SHOWN if key in adapter.metadata},
    }
    if json:
        out.print_json(data={**facts, "metadata": dict(adapter.metadata), "by_module": modules})
        return
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")  # a hash is shown whole
    for key, value in facts.items():
        table.add_row(Text(key, style="dim"), Text(", ".join(map(str, value)) if isinstance(value, list) else _brief(value)))
    for source in adapter.metadata.get("sources", []):
        weight = f" x {source['weight']:g}" if "weight" in source else ""
        table.add_row(Text("source", style="dim"), Text(f"{source.get('name', '?')}{weight}  {source.get('sha256', '')[:12]}"))
    out.print(table)


def _add_norms(folder: Path, modules: dict[str, Any]) -> None:
    """The Frobenius norm of every module's change of weight."""
    from valign.merging.deltas import inner
    from valign.models.files.adapter_files import open_adapter

    for module, lora in open_adapter(folder).items():
        modules[module]["norm"] = sqrt(max(0.0, inner(lora, lora)))


@app.command("export", epilog="example: valign adapter export runs/merged merged.safetensors --format kohya")
def export(
    folder: Annotated[Path, Argument(help="the adapter", callback=there())],
    file: Annotated[Path, Argument(help="new .safetensors file")],
    format_: Annotated[Literal["kohya"], Option("--format", help="what ComfyUI and most web interfaces read")] = "kohya",
    family: Annotated[Literal["stable-diffusion", "sdxl"] | None, Option(help="where the adapter does not say")] = None,
    force: Annotated[bool, Option("--force", help="overwrite the file")] = False,
) -> None:
    """Write an adapter in another tool's layout, without loss."""
    from valign.models.files.kohya import export_kohya

    if file.suffix != ".safetensors":
        raise UserError(f"{file} must end in .safetensors. Rename it; pickles are not written.")
    if file.exists() and not force:
        raise UserError(f"{file} exists. Choose another name, or add --force.")
    out.print(str(export_kohya(folder, file, family=family)), soft_wrap=True)


@app.command("import", epilog="example: valign adapter import downloaded.safetensors runs/downloaded")
def import_(
    file: Annotated[Path, Argument(help="a kohya .safetensors file", callback=there())],
    folder: Annotated[Path, Argument(help="new adapter folder")],
) -> None:
    """Turn a kohya file into an adapter folder, which loads, merges and evaluates here."""
    from valign.models.files.kohya import import_kohya

    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists. Choose another folder, or delete it first.")
    out.print(str(import_kohya(file, folder)), soft_wrap=True)


@app.command("fuse", epilog="example: valign adapter fuse shapes runs/merged runs/aligned-model")
def fuse(
    model: Annotated[str, Argument(help="folder of the model, or a world's name", callback=checked(refuse_subject, "MODEL"))],
    adapter: Annotated[Path, Argument(help="the adapter, or a run of `valign train`", callback=there())],
    folder: Annotated[Path, Argument(help="new folder for the model with the adapter in its weights")],
    weight: Annotated[float, Option(help="of the adapter")] = 1.0,
    anyway: Anyway = False,
) -> None:
    """Add an adapter to its model's weights for good: the result is a model folder like any other."""
    refuse_other_base(model, [adapter], anyway=anyway)
    from valign.merging.fuse_adapter import fuse_adapter
    from valign.recipes.subjects import find_subjects

    subject, _ = find_subjects(model, model)
    if subject.adapter is not None:
        raise UserError(f"MODEL must be a whole model, got the adapter {model}. Name the model that it was made for.")
    out.print(str(fuse_adapter(subject.folder, adapter, folder, weight=weight, anyway=anyway)), soft_wrap=True)


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
