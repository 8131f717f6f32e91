"""``valign merge``: combine experts into one adapter, or look first at what that would do."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from rich.text import Text
from typer import Argument, Context, Option, Typer
from typer.main import get_command

from valign.checks import UserError, close_to, option
from valign.cli.common import PromptTableOptions, err, numbers_by_name, out, resolve_model, there
from valign.cli.options import TableGroup, configured, record
from valign.cli.quick import table_row

if TYPE_CHECKING:
    from valign.merging import Calibration, Expert, MergeContext, MergeMethod, MergePlan


class Merges(TableGroup):
    """A command for each row of `valign.merging.MERGES`."""

    table = "valign.merging:MERGES"
    make = staticmethod(lambda name: merge_command(name))
    sketch = staticmethod(lambda name: _sketch(name))


app = Typer(no_args_is_help=True)


@app.callback(cls=Merges)
def merge() -> None:
    """Combine adapters into one. An expert is FOLDER or NAME=FOLDER; without a name it has its category's, or its folder's.
    --weight NAME=0.5 multiplies its change of the model."""


Experts = Annotated[
    list[str], Argument(metavar="[NAME=]FOLDER", help="adapter folders, or runs of `valign train`", callback=there(named=True))
]
Out = Annotated[Path, Option("--out", "-o", help="new folder for the merged adapter")]
Weights = Annotated[list[str], Option("--weight", metavar="NAME=NUMBER", help="strength of an expert, 1 if not given; repeat it")]
Mismatch = Annotated[bool, Option("--allow-base-mismatch", "--anyway", help="accept experts of different base models")]
JSON = Annotated[bool, Option("--json", help="as JSON")]


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What a calibrated merge looks at."""

    model: str = option("", help="the base model: shapes, a pipeline folder or a hub id", flags=("--model", "-m"))
    data: Path | None = option(None, help="data set whose unsafe prompts are looked at", flags=("--data", "-d"))
    prompts: Path | None = option(None, help="file of unsafe prompts with categories, instead of --data")
    device: str = option("auto", help="auto, cpu, cuda, ...")


@dataclass(frozen=True, kw_only=True)
class PreservingOptions(CalibrationOptions):
    """What a merge looks at that also preserves and edits."""

    benign: Path | None = option(
        None,
        help="file of benign captions to leave as they are; the data set's, or its safe prompts, if left out",
        flags=("--benign",),
    )
    edit: str = option("", help="policy whose concepts are also moved to their safe counterparts (UCE): a name or a YAML file")


def merge_command(name: str) -> Any:
    """The command of one merge: its options come from the dataclass in the table."""
    from valign.merging import MERGES

    kind = MERGES[name]
    parts = {"method": kind, **({"calibration": _seen(kind), "table": PromptTableOptions} if kind.calibrated else {})}
    return _command(name, parts, help=(kind.__doc__ or "").split("\n")[0], epilog=f"example: valign merge {name} {kind.example}")


def _sketch(name: str) -> Any:
    """The command with all parts that one may have, none of them imported."""
    return _command(name, {"method": table_row(Merges.table, name), "calibration": PreservingOptions, "table": PromptTableOptions})


def _seen(kind: "type[MergeMethod]") -> type[CalibrationOptions]:
    return PreservingOptions if kind.preserves else CalibrationOptions


def _command(name: str, parts: Mapping[str, Any], **told: str) -> Any:
    single = Typer(add_completion=False)
    single.command(name, cls=configured(pipeline=True, **parts), **told)(_merge)  # type: ignore[arg-type]
    return get_command(single)


def _merge(
    ctx: Context,
    experts: Experts,
    folder: Out,
    weight: Weights = [],  # noqa: B006
    allow_base_mismatch: Mismatch = False,
) -> None:
    from valign.merging import MERGES, MergeContext

    name = str(ctx.info_name)
    kind = MERGES[name]
    method, chosen = record(ctx, kind), parse_experts(experts, weight, out=folder)
    given = None
    if method.needs_calibration:
        given = calibration(name, chosen, record(ctx, _seen(kind)), record(ctx, PromptTableOptions))
    context = MergeContext(allow_base_mismatch=allow_base_mismatch, calibration=given, folder=folder, keep_votes=True)
    write(folder, name, method, chosen, context)


@app.command("plan", epilog="example: valign merge plan runs/hate runs/violence --rank 8")
def plan(
    experts: Experts,
    rank: Annotated[int | None, Option(min=1, help="rank of the result in every module; the error is reported")] = None,
    weight: Weights = [],  # noqa: B006
    json: JSON = False,
    allow_base_mismatch: Mismatch = False,
) -> None:
    """Check that experts fit together; show how alike they are and what a lower rank would cost. Writes nothing."""
    from valign.merging import plan_merge

    result = plan_merge(parse_experts(experts, weight), rank=rank, allow_base_mismatch=allow_base_mismatch)
    if json:
        out.print_json(data=asdict(result))
    else:
        out.print(_plan_table(result))
        out.print(
            f"{result.modules} modules match. Their sum at rank {result.rank}: {result.error:.1%} error, "
            f"{result.worst_error:.1%} in the worst module ({result.worst_module}). regmean would hold second moments of "
            f"{result.moment_bytes / 1e6:,.1f} MB.",
            markup=False,
        )


def parse_experts(texts: Sequence[str], weights: Sequence[str] = (), *, out: Path | None = None) -> "list[Expert]":
    """``FOLDER`` or ``NAME=FOLDER``, and ``NAME=NUMBER`` for the weights; ``out`` must not be the folder of one of them."""
    from valign.merging import Expert
    from valign.models.files.adapter_files import open_adapter

    opened = {}
    for text in texts:
        match = re.fullmatch(r"([\w-]+)=(.+)", text)
        file = open_adapter(match[2] if match else text)
        folder = Path(match[2] if match else text).resolve()
        otherwise = folder.parent.name if folder.name == "adapter" else folder.stem
        name = match[1] if match else str(file.metadata.get("category") or otherwise)
        if name in opened:
            raise UserError(f"Experts must have different names, got {name} twice. Write NAME=FOLDER to name them.")
        if out is not None and file.folder.resolve() in (out.resolve(), (out / "adapter").resolve()):
            raise UserError(f"--out must be another folder than the expert {name}, got {out}. Choose another --out.")
        opened[name] = file
    strengths = numbers_by_name("--weight", weights)
    unknown = sorted(set(strengths) - set(opened))
    if unknown:
        raise UserError(f"--weight must name one of {', '.join(opened)}; got {', '.join(unknown)}.{close_to(unknown[0], opened)}")
    return [Expert(name, file, strengths.get(name, 1.0)) for name, file in opened.items()]


def write(folder: Path, name: str, method: "MergeMethod", experts: "Sequence[Expert]", context: "MergeContext") -> None:
    """Merge into ``folder`` with its `run.json`, and print the summary; a finished merge of the same things is only printed."""
    from valign.merging import kernels_of, merge_metadata, write_merge
    from valign.runs import Run

    if folder.exists() and any(folder.iterdir()) and not (folder / "run.json").exists():
        raise UserError(f"{folder} exists and is not a merge. Choose another --out, or delete it first.")
    how, seed = method.record(experts, context), getattr(method, "seed", 0)
    weights = {expert.name: expert.weight for expert in experts}
    inputs = {expert.name: expert.file.fingerprint() for expert in experts}
    run = Run.open(folder, step=f"merge {name}", recipe={**how, "weights": weights}, inputs=inputs, seed=seed)
    if not run.done:
        metadata = merge_metadata(name, experts, {**how, "seed": seed})
        try:
            merged = method(experts, context)
            if "shares" in context.results:
                err.print(_shares(context.results["shares"]))
            made = write_merge(
                merged, folder, metadata, prefix=experts[0].file.prefix, kernels=kernels_of(experts), errors=context.errors
            )
        except UserError:
            run.give_up()
            raise
        run.finish(**made, **context.results)
    out.print_json(data={"adapter": str(folder), **run.results})


def calibration(name: str, experts: "Sequence[Expert]", options: CalibrationOptions, table: PromptTableOptions) -> "Calibration":
    """Model and prompts of a calibrated merge. Raises: UserError if one of them is missing."""
    from valign.merging import Calibration

    texts = _calibration_prompts(name, experts, options.data, options.prompts, table)
    if not options.model:
        other = "" if isinstance(options, PreservingOptions) else f", or --votes of an earlier {name}"
        raise UserError(f"{name} needs --model, the base model of the experts{other}.")
    more = _preserved(name, options, table) if isinstance(options, PreservingOptions) else {}
    load = partial(resolve_model, options.model, device=options.device)
    return Calibration(model=load, prompts=texts, model_name=options.model, **more)


def _preserved(name: str, options: PreservingOptions, table: PromptTableOptions) -> dict[str, Any]:
    """Captions and edits. Raises: UserError if there are no captions, or the policy is not one."""
    from valign.cli.data import read_retained
    from valign.data.images.latents import retained_prompts
    from valign.data.prompts.pairs import load_pairs
    from valign.policy import load_policy
    from valign.recipes.baselines import policy_concepts

    edits = tuple(zip(*policy_concepts(load_policy(options.edit)), strict=True)) if options.edit else ()
    if options.benign is not None:
        return {"captions": read_retained(options.benign, load_policy(options.edit or "default"), table.reading()), "edits": edits}
    if options.data is None:
        raise UserError(f"{name} needs --benign FILE, captions on which the merge leaves the model as it is.")
    safe = [pair.safe for pair in load_pairs(options.data / "prompts" / "pairs.parquet")]
    return {"captions": tuple(retained_prompts(options.data) or dict.fromkeys(safe)), "edits": edits}


def _calibration_prompts(
    name: str, experts: "Sequence[Expert]", data: Path | None, prompts: Path | None, table: PromptTableOptions
) -> dict[str, list[str]]:
    """Unsafe prompts by category: of the experts' categories where all are known, otherwise of all that there are."""
    if (data is None) == (prompts is None):
        raise UserError(f"{name} needs one of --data FOLDER and --prompts FILE, the unsafe prompts to look at.")
    found: dict[str, list[str]] = {}
    if data is not None:
        from valign.data.prompts.pairs import load_pairs

        for pair in load_pairs(data / "prompts" / "pairs.parquet"):
            for category in () if pair.held_out else pair.categories:
                found.setdefault(category, []).append(pair.unsafe)
    else:
        from valign.data.prompts.readers import read_prompts

        for row in read_prompts(str(prompts), table.format, reading=table.reading()):
            for category in (row.categories or ("",)) if row.label else ():
                found.setdefault(category, []).append(row.prompt)
    if not found:
        raise UserError(f"{data or prompts} must hold unsafe prompts, got none. Choose another data set.")
    trained = {str(expert.file.metadata.get("category", "")) for expert in experts}
    if trained <= found.keys():
        found = {category: found[category] for category in sorted(trained)}
    err.print(f"Prompts of {', '.join(sorted(name or 'no category' for name in found))} are looked at.", markup=False)
    return found


def _shares(shares: Mapping[str, float]) -> Table:
    table = Table("expert", "share of neurons", box=None, header_style="dim")
    for name, share in shares.items():
        table.add_row(Text(name), f"{share:.1%}")
    return table


def _plan_table(result: "MergePlan") -> Table:
    table = Table("expert", "rank", "norm", box=None, header_style="dim")
    for name in result.experts:
        table.add_column(f"cosine to {name}", justify="right")
    for i, name in enumerate(result.experts):
        low, high = result.ranks[i]
        rank = str(low) if low == high else f"{low}-{high}"
        table.add_row(Text(name), rank, f"{result.norms[i]:.4g}", *(f"{cosine:+.3f}" for cosine in result.cosines[i]))
    return table
