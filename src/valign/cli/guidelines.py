"""``valign guidelines``: find those for a request, let a chat model write further ones, fit and measure the retriever."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from valign.checks import UserError
from valign.cli.common import AsJson, ChatOptions, PromptTableOptions, err, out, print_measured
from valign.cli.options import configured, record

app = typer.Typer(no_args_is_help=True, help="Guidelines of the policy that fit a request: find, write, fit, measure.")

PolicyName = Annotated[str, Option("--policy", "-p", help="default, or a policy file")]
Retriever = Annotated[Path | None, Option(help="a file of `valign guidelines fit`; the shipped one")]


@app.command("find", epilog='example: valign guidelines find "a surgeon at work" "a beggar on the corner"')
def find(
    requests: Annotated[list[str], Argument(help="requests for an image")],
    policy: PolicyName = "default",
    retriever: Retriever = None,
    count: Annotated[int, Option(min=1, help="guidelines per request")] = 6,
) -> None:
    """Print the guidelines that a chat model gets for each request, the best first."""
    from valign.guard.guidelines import policy_retriever
    from valign.models.heads.bi_encoder import load_bi_encoder
    from valign.policy import load_policy

    rules = load_policy(policy)
    known = policy_retriever(rules, model=load_bi_encoder(retriever) if retriever else None, count=count)
    if known is None:
        raise UserError(
            f"policy {rules.id} must have guidelines with requests, got none. Write some, or `valign guidelines build`."
        )
    for request in requests:
        if len(requests) > 1:
            out.print(Text(request, style="bold"))
        for one in known.retrieve(request):
            out.print(f"{one.id}: {one.text}", markup=False, soft_wrap=True)


@app.command(
    "build",
    cls=configured(chat=ChatOptions, table=PromptTableOptions),
    epilog="example: valign guidelines build --requests prompts.txt --chat http://127.0.0.1:8000/v1 -o runs/guidelines",
)
def build(
    ctx: typer.Context,
    requests: Annotated[Path, Option("--requests", "-r", help="requests for images: text (one a line), jsonl, csv or parquet")],
    folder: Annotated[Path, Option("--out", "-o", help="folder for guidelines.yaml, to be reviewed")],
    policy: PolicyName = "default",
) -> None:
    """Let a chat model write guidelines for requests, without repeats. They go into a file for review, and into no policy."""
    from valign.data.prompts.records import prompt_texts
    from valign.models.encoders.minilm import MiniLM
    from valign.policy import load_policy
    from valign.recipes.guidelines import build_library

    options = record(ctx, ChatOptions)
    chat = options.load()
    if chat is None or options.chat is None:
        raise UserError("--chat must name the chat model that writes, got none. Give an endpoint's address, or a folder.")
    name = options.chat_model if options.chat.startswith("http") else Path(options.chat).name
    table = record(ctx, PromptTableOptions)
    texts = list(prompt_texts(requests, table.format, table.reading()))
    found = build_library(chat, texts, load_policy(policy), folder, model=name, encoder=MiniLM())
    err.print(f"{len(found.entries)} guidelines, {found.repeated} repeats, {found.failed} requests without a usable answer.")
    out.print(str(folder / "guidelines.yaml"), markup=False, soft_wrap=True)


@app.command(
    "fit",
    cls=configured(fit="valign.training.tasks.guidelines:GuidelineFitConfig"),
    epilog="example: valign guidelines fit -p my-site.yaml -o runs/guidelines.safetensors",
)
def fit(
    ctx: typer.Context,
    path: Annotated[Path, Option("--out", "-o", help="file for the retriever")],
    policy: PolicyName = "default",
    held_out: Annotated[int, Option(min=0, help="last requests of each guideline that are kept out, to measure on")] = 2,
) -> None:
    """Fit the retriever on the requests that the policy's guidelines name."""
    from valign.models.encoders.minilm import MiniLM
    from valign.policy import load_policy
    from valign.recipes.guidelines import fit_retriever
    from valign.training.tasks.guidelines import GuidelineFitConfig

    config = record(ctx, GuidelineFitConfig)
    _, losses = fit_retriever(load_policy(policy), path, encoder=MiniLM(), config=config, held_out=held_out)
    err.print(f"Loss of the first epoch {losses[0]:.3f}, of the last {losses[-1]:.3f}.")
    out.print(str(path), markup=False, soft_wrap=True)


@app.command("measure", epilog="example: valign guidelines measure")
def measure(
    policy: PolicyName = "default",
    retriever: Retriever = None,
    count: Annotated[int, Option(min=1, help="guidelines per request")] = 6,
    held_out: Annotated[int, Option(min=1, help="last requests of each guideline, which `fit` kept out")] = 2,
    library: Annotated[int, Option(min=2, help="guidelines of the made-up library that the search is timed on")] = 10_000,
    as_json: AsJson = False,
) -> None:
    """Recall on held-out requests, beside BM25 and the frozen encoder; and milliseconds of a search in a large library."""
    from valign.guard.guidelines import SHIPPED
    from valign.models.encoders.minilm import MiniLM
    from valign.models.heads.bi_encoder import load_bi_encoder
    from valign.policy import load_policy
    from valign.recipes.guidelines import measure_recall, search_milliseconds

    model, encoder = load_bi_encoder(retriever or SHIPPED), MiniLM()
    table = Table("retriever", f"recall@{count}", "95 % interval", "requests")
    rows = measure_recall(load_policy(policy), model, encoder, count=count, held_out=held_out)
    for row in rows:
        table.add_row(row.retriever, f"{row.value:.3f}", f"{row.low:.3f} to {row.high:.3f}", str(row.pairs))
    first, later = search_milliseconds(model, library)
    times = f"{first:.2f} ms for new texts, {later:.2f} ms for texts compared before (medians)"
    measured = {"recall": [asdict(row) for row in rows], "search_ms": {"new_texts": first, "texts_seen_before": later}}
    print_measured(measured, Group(table, Text(f"Search of {library} guidelines: {times}.")), as_json=as_json)
