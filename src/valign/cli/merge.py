"""``valign merge``: combine experts into one adapter, or look first at what that would do."""

import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.table import Table
from rich.text import Text
from typer import Argument, Option, Typer

from valign.checks import UserError
from valign.cli.common import err, numbers_by_name, out, resolve_model

if TYPE_CHECKING:
    from valign.merging import Expert, MergePlan, Votes
    from valign.models.files.adapter_files import LoraFactors

app = Typer(
    no_args_is_help=True,
    help="Combine adapters into one. An expert is FOLDER or NAME=FOLDER; without a name it has its category's, or its folder's. "
    "--weight NAME=0.5 multiplies its change of the model.",
)

Experts = Annotated[list[str], Argument(metavar="[NAME=]FOLDER", help="adapter folders, or runs of `valign train`")]
Out = Annotated[Path, Option("--out", "-o", help="new folder for the merged adapter")]
Weights = Annotated[list[str], Option("--weight", metavar="NAME=NUMBER", help="strength of an expert, 1 if not given; repeat it")]
Mismatch = Annotated[bool, Option("--allow-base-mismatch", help="accept experts of different base models")]
Rank = Annotated[int | None, Option(min=1, help="rank of the result in every module; the error is reported")]
Density = Annotated[float, Option(help="fraction of entries kept, in (0, 1]")]
Normalize = Annotated[Literal["weights", "count", "none"], Option(help="what the sum of agreeing entries is divided by")]
Scale = Annotated[float, Option(help="factor on the result")]
Seed = Annotated[int, Option(help="of every draw")]
JSON = Annotated[bool, Option("--json", help="as JSON")]


@app.command(
    "co-merge", epilog="example: valign merge co-merge runs/hate violence=runs/v -o runs/merged --model shapes --data runs/data"
)
def co_merge(
    experts: Experts,
    folder: Out,
    model: Annotated[str, Option("--model", "-m", help="the base model: shapes, a pipeline folder or a hub id")] = "",
    data: Annotated[Path | None, Option("--data", "-d", help="data set whose unsafe prompts vote")] = None,
    prompts: Annotated[Path | None, Option(help="file of unsafe prompts with categories, instead of --data")] = None,
    votes: Annotated[Path | None, Option(help="folder of an earlier co-merge of these experts; no model is run then")] = None,
    granularity: Annotated[
        Literal["output", "rank_unit", "factor"], Option(help="what is copied as one: a row of the change, a rank, a factor's row")
    ] = "output",
    rank: Rank = None,
    per_category: Annotated[int, Option(min=1, help="prompts that vote for each category")] = 64,
    states: Annotated[int, Option(min=1, help="denoising states per prompt")] = 4,
    steps: Annotated[int, Option(min=1, help="denoising steps of a whole trajectory")] = 50,
    vote: Annotated[
        Literal["prompt", "topk", "mass"], Option(help="one vote per prompt, every expert's own best, or sums of activation")
    ] = "prompt",
    top_k: Annotated[int | None, Option(min=1, help="neurons per expert and prompt, for --vote topk")] = None,
    inputs: Annotated[
        Literal["base", "per_expert"], Option(help="experts listen to the base model, or each to its own activations")
    ] = "base",
    weight: Weights = [],  # noqa: B006
    batch_size: Annotated[int, Option(min=1, help="prompts at a time")] = 8,
    seed: Seed = 0,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    allow_base_mismatch: Mismatch = False,
) -> None:
    """Copy every neuron from the expert that unsafe prompts activate most (AlignGuard, arXiv 2412.10493)."""
    from valign.files import hash_value
    from valign.merging import Votes, co_merge, collect_votes, save_selection, selection_report

    chosen = parse_experts(experts, weight)
    how: dict[str, Any] = {"granularity": granularity, "rank": rank, "vote": vote}
    if votes is not None:
        counted = Votes.load(votes)
        how |= {"vote": counted.vote, "calibration": dict(counted.record)}

        def collect() -> "Votes":
            return counted
    else:
        texts = _calibration_prompts(chosen, data, prompts)
        if not model:
            raise UserError("co-merge needs --model, the base model of the experts, or --votes of an earlier co-merge.")
        asked: dict[str, Any] = {"per_category": per_category, "states": states, "steps": steps, "top_k": top_k, "inputs": inputs}
        how |= {"model": model, "prompts": hash_value(texts), **asked}

        def collect() -> "Votes":
            base = resolve_model(model, device=device)
            return collect_votes(
                base, chosen, texts, **asked, vote=vote, batch_size=batch_size, seed=seed, allow_base_mismatch=allow_base_mismatch
            )

    def stream(errors: MutableMapping[str, float]) -> "Iterator[tuple[str, LoraFactors]]":
        found = collect()
        merged = co_merge(chosen, found, granularity=granularity, rank=rank, errors=errors, allow_base_mismatch=allow_base_mismatch)
        found.save(folder)
        report = selection_report(found, "rank_unit" if granularity == "rank_unit" else "output")
        save_selection(report, folder)
        err.print(_shares(report.experts, report.shares))
        return merged

    write(folder, "co-merge", chosen, how, stream, seed)


@app.command("mean", epilog="example: valign merge mean runs/hate runs/violence -o runs/mean")
def mean(experts: Experts, folder: Out, weight: Weights = [], allow_base_mismatch: Mismatch = False) -> None:  # noqa: B006
    """Average the experts' changes, exactly. Weights multiply; the divisor is the number of experts."""
    from valign.merging import merge_mean

    chosen = parse_experts(experts, weight)
    write(folder, "mean", chosen, {}, lambda _: merge_mean(chosen, allow_base_mismatch=allow_base_mismatch))


@app.command("sum", epilog="example: valign merge sum style=runs/style safety=runs/merged --weight style=0.8 -o runs/both")
def total(experts: Experts, folder: Out, weight: Weights = [], allow_base_mismatch: Mismatch = False) -> None:  # noqa: B006
    """Add the experts' changes, exactly, without mixing their factors."""
    from valign.merging import merge_sum

    chosen = parse_experts(experts, weight)
    write(folder, "sum", chosen, {}, lambda _: merge_sum(chosen, allow_base_mismatch=allow_base_mismatch))


@app.command("ties", epilog="example: valign merge ties runs/hate runs/violence --density 0.2 -o runs/ties")
def ties(
    experts: Experts,
    folder: Out,
    density: Density = 0.2,
    normalize: Normalize = "weights",
    scale: Scale = 1.0,
    rank: Rank = None,
    weight: Weights = [],  # noqa: B006
    allow_base_mismatch: Mismatch = False,
) -> None:
    """Keep each expert's largest changes, elect signs, add what agrees (TIES, arXiv 2306.01708)."""
    from valign.merging import merge_ties

    chosen = parse_experts(experts, weight)
    how: dict[str, Any] = {"density": density, "normalize": normalize, "scale": scale, "rank": rank}
    write(folder, "ties", chosen, how, lambda e: merge_ties(chosen, **how, errors=e, allow_base_mismatch=allow_base_mismatch))


@app.command("dare-ties", epilog="example: valign merge dare-ties runs/hate runs/violence --density 0.5 -o runs/dare")
def dare_ties(
    experts: Experts,
    folder: Out,
    density: Density = 0.5,
    normalize: Normalize = "weights",
    scale: Scale = 1.0,
    rank: Rank = None,
    weight: Weights = [],  # noqa: B006
    seed: Seed = 0,
    allow_base_mismatch: Mismatch = False,
) -> None:
    """Drop random entries, rescale, elect signs, add what agrees (DARE, arXiv 2311.03099)."""
    from valign.merging import merge_dare_ties

    chosen = parse_experts(experts, weight)
    how: dict[str, Any] = {"density": density, "normalize": normalize, "scale": scale, "rank": rank}
    write(
        folder,
        "dare-ties",
        chosen,
        how,
        lambda e: merge_dare_ties(chosen, **how, seed=seed, errors=e, allow_base_mismatch=allow_base_mismatch),
        seed,
    )


@app.command(
    "best-single", epilog="example: valign merge best-single hate=a violence=b --score hate=0.2 --score violence=0.1 -o best"
)
def best(
    experts: Experts,
    folder: Out,
    score: Annotated[list[str], Option(metavar="NAME=NUMBER", help="an expert's score, lower is better; one for each")],
    weight: Weights = [],  # noqa: B006
    allow_base_mismatch: Mismatch = False,
) -> None:
    """Take the expert with the lowest score, e.g. its share of harmful images: the baseline of every merge."""
    from valign.merging import best_single

    chosen, scores = parse_experts(experts, weight), numbers_by_name("--score", score)
    write(
        folder,
        "best-single",
        chosen,
        {"scores": scores},
        lambda _: best_single(chosen, scores, allow_base_mismatch=allow_base_mismatch),
    )


@app.command("plan", epilog="example: valign merge plan runs/hate runs/violence --rank 8")
def plan(
    experts: Experts,
    rank: Rank = None,
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
            f"{result.worst_error:.1%} in the worst module ({result.worst_module}).",
            markup=False,
        )


def parse_experts(texts: Sequence[str], weights: Sequence[str] = ()) -> "list[Expert]":
    """``FOLDER`` or ``NAME=FOLDER``, and ``NAME=NUMBER`` for the weights."""
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
        opened[name] = file
    strengths = numbers_by_name("--weight", weights)
    unknown = sorted(set(strengths) - set(opened))
    if unknown:
        raise UserError(f"--weight must name one of {', '.join(opened)}; got {', '.join(unknown)}.")
    return [Expert(name, file, strengths.get(name, 1.0)) for name, file in opened.items()]


def write(
    folder: Path,
    method: str,
    experts: "Sequence[Expert]",
    options: Mapping[str, Any],
    stream: Any,
    seed: int = 0,
) -> None:
    """Merge into ``folder`` with its `run.json`, and print the summary; a finished merge of the same things is only printed."""
    from valign.merging import merge_metadata, write_merge
    from valign.runs import Run

    for expert in experts:
        if expert.file.folder.resolve() in (folder.resolve(), (folder / "adapter").resolve()):
            raise UserError(f"--out must be another folder than the expert {expert.name}, got {folder}. Choose another --out.")
    if folder.exists() and any(folder.iterdir()) and not (folder / "run.json").exists():
        raise UserError(f"{folder} exists and is no merge. Choose another --out, or delete it first.")
    weights = {expert.name: expert.weight for expert in experts}
    inputs = {expert.name: expert.file.fingerprint() for expert in experts}
    run = Run.open(folder, step=f"merge {method}", recipe={**options, "weights": weights}, inputs=inputs, seed=seed)
    if not run.done:
        errors: dict[str, float] = {}
        metadata = merge_metadata(method, experts, {**options, "seed": seed})
        run.finish(**write_merge(stream(errors), folder, metadata, errors=errors))
    out.print_json(data={"adapter": str(folder), **run.results})


def _calibration_prompts(experts: "Sequence[Expert]", data: Path | None, prompts: Path | None) -> dict[str, list[str]]:
    """Unsafe prompts by category: of the experts' categories where all are known, otherwise of all that there are."""
    if (data is None) == (prompts is None):
        raise UserError("co-merge needs one of --data FOLDER and --prompts FILE, the unsafe prompts that vote.")
    found: dict[str, list[str]] = {}
    if data is not None:
        from valign.data.prompts.pairs import load_pairs

        for pair in load_pairs(data / "prompts" / "pairs.parquet"):
            for category in () if pair.held_out else pair.categories:
                found.setdefault(category, []).append(pair.unsafe)
    else:
        from valign.data.prompts.readers import read_prompts

        for row in read_prompts(str(prompts)):
            for category in row.category.split(",") if row.label else ():
                found.setdefault(category, []).append(row.prompt)
    if not found:
        raise UserError(f"{data or prompts} must hold unsafe prompts, got none. Choose another data set.")
    trained = {str(expert.file.metadata.get("category", "")) for expert in experts}
    if trained <= found.keys():
        found = {category: found[category] for category in sorted(trained)}
    err.print(f"Prompts of {', '.join(sorted(name or 'no category' for name in found))} vote.", markup=False)
    return found


def _shares(names: Sequence[str], shares: Sequence[float]) -> Table:
    table = Table("expert", "share of neurons", box=None, header_style="dim")
    for name, share in zip(names, shares):
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
