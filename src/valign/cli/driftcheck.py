"""``valign driftcheck`` (also ``driftcaps``): its suite from public sets, what fine-tuning did to refusals, the forgetting law."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from typer import Context, Option, Typer

from valign.checks import UserError
from valign.cli.common import Anyway, AsJson, PromptTableOptions, err, out, print_measured, values_by_name
from valign.cli.judges import AnswerJudgeOptions
from valign.cli.options import configured, record, refuse_given

app = Typer(no_args_is_help=True, help="What fine-tuning did to a chat model's refusals (DRIFTCHECK, DriftCaps).")
NONE: list[Path] = []


@app.callback()
def driftcheck() -> None:
    """What fine-tuning did to a chat model's refusals (DRIFTCHECK, DriftCaps)."""


@app.command(epilog="example: valign driftcheck build --mmlu mmlu.csv --hatecheck hatecheck.csv -o driftcheck.jsonl")
def build(
    file: Annotated[Path, Option("--out", "-o", help="suite that is written")],
    mmlu: Annotated[list[Path], Option(help="MMLU questions: a table with a column question; repeatable")] = NONE,
    hh_rlhf: Annotated[list[Path], Option(help="HH-RLHF: a table with a column chosen; repeatable")] = NONE,
    hatecheck: Annotated[list[Path], Option(help="HateCheck's test cases; repeatable")] = NONE,
    openai_moderation: Annotated[list[Path], Option(help="OpenAI's moderation evaluation set; repeatable")] = NONE,
    size: Annotated[int, Option(min=1, help="prompts of either sort, at most")] = 5000,
    seed: Annotated[int, Option(help="of the shuffles")] = 42,
) -> None:
    """Build the suite from local files of the public sets."""
    from valign.evaluation.driftcheck.suite import build_suite
    from valign.evaluation.suite_files import write_suite

    given = {"mmlu": mmlu, "hh-rlhf": hh_rlhf, "hatecheck": hatecheck, "openai-moderation": openai_moderation}
    suite = build_suite({name: files for name, files in given.items() if files}, size=size, seed=seed)
    write_suite(file, suite)
    unsafe = sum(not prompt.benign for prompt in suite.prompts)
    err.print(Text(f"{unsafe} unsafe prompts of {len(suite.categories())} categories and {len(suite) - unsafe} safe ones"))
    out.print(str(file), soft_wrap=True)


@app.command(
    cls=configured(judging=AnswerJudgeOptions, table=PromptTableOptions),
    epilog="example: valign driftcheck run -m start=chat -m lora=runs/plain -m agl=runs/agl --plain lora -o runs/drift",
)
def run(
    ctx: Context,
    model: Annotated[
        list[str],
        Option(
            "--model", "-m", metavar="NAME=PLACE", help="chat models: the aligned start first; folders, adapters, or chat:STAGE"
        ),
    ],
    folder: Annotated[Path, Option("--out", "-o", help="folder of answers and numbers; an unfinished one is resumed")],
    suite: Annotated[str, Option("--suite", "-s", help="chat, the chat world's edition, or a suite's file")] = "chat",
    plain: Annotated[str, Option(help="name of the plain fine-tuning that the others' drift is compared with")] = "",
    samples: Annotated[int, Option(min=1, max=300, help="requests per kind of the chat world's edition")] = 300,
    toxicity: Annotated[Path | None, Option(help="folder of a transformers text classifier that scores answers' toxicity")] = None,
    toxic_label: Annotated[str, Option(help="its label that says toxic")] = "toxicity",
    max_tokens: Annotated[int, Option(min=1, help="length of an answer")] = 128,
    depth: Annotated[int, Option(min=0, help="tokens of the KL profile; 0 is off")] = 20,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    anyway: Anyway = False,
    as_json: AsJson = False,
) -> None:
    """Measure refusals of unsafe and safe prompts, drift against the first model, and the KL divergence by token."""
    from valign.evaluation.chats.cases import suite_cases
    from valign.evaluation.chats.judges import PhraseJudge
    from valign.evaluation.chats.toxicity import classifier_scorer
    from valign.evaluation.suite_files import read_suite
    from valign.recipes.driftcheck import driftcheck as measure
    from valign.recipes.subjects import find_subjects
    from valign.worlds import CHAT_WORLDS

    places = values_by_name("--model", model)
    if len(places) < len(model):
        raise UserError("--model must have names of their own, got one twice. Give NAME=PLACE.")
    first = next(iter(places.values()))
    subjects = {name: find_subjects(first, place)[1] for name, place in places.items()}
    if all(one.adapter is None for one in subjects.values()):
        refuse_given(ctx, "without an adapter", "anyway")
    named, table = record(ctx, AnswerJudgeOptions).resolve(), record(ctx, PromptTableOptions)
    if toxicity is None:
        refuse_given(ctx, "without --toxicity", "toxic_label")
    if suite in CHAT_WORLDS:
        refuse_given(ctx, "on the chat world's own requests", parts=(PromptTableOptions,))
        cases, usual = CHAT_WORLDS[suite].cases(samples), CHAT_WORLDS[suite].judge()
    else:
        refuse_given(ctx, "beside a suite of your own", "samples")
        cases, usual = suite_cases(read_suite(suite, table.format, reading=table.reading())), PhraseJudge()
    found = measure(
        subjects,
        cases,
        named or usual,
        folder,
        plain=plain,
        toxicity=None if toxicity is None else classifier_scorer(toxicity, label=toxic_label, device=device),
        max_tokens=max_tokens,
        depth=depth,
        device=device,
        anyway=anyway,
    )
    err.print(drift_table(found))
    for note in found["notes"]:
        err.print(Text(note, style="dim"))
    print_measured(found, str(folder / "driftcheck.json"), as_json=as_json)


@app.command(epilog="example: valign driftcheck law --runs runs.csv")
def law(
    runs: Annotated[Path, Option("--runs", help="table of fine-tunings: tokens, parameters, rise (of the loss on old data)")],
) -> None:
    """Fit the law of forgetting, rise = A tokens^beta / parameters^alpha + E, with 95 % intervals over runs."""
    from dataclasses import asdict

    import numpy as np

    from valign.data.prompts.tables import number_cell, read_records
    from valign.evaluation.driftcheck.forgetting_law import fit_forgetting_law

    columns = ("tokens", "parameters", "rise")
    rows = [[number_cell(name, row[name]) for name in columns] for _, row in read_records(runs, columns)]
    out.print_json(data=asdict(fit_forgetting_law(*np.array(rows).T)))


def drift_table(found: Mapping[str, Any]) -> Table:
    """One row per model: shares in per cent with 95 % intervals."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    prompts = found["prompts"]
    table.title = f"{prompts['unsafe']} unsafe and {prompts['safe']} safe prompts; judge {found['judge']['name']}"
    table.caption = "Per cent with 95 % intervals; drift: unsafe prompts that are no longer refused, paired."
    toxic = any(one["toxic"] for one in found["systems"])
    for name in ("model", "unsafe refused", "safe answered", "drift", "drift reduced by", *(["toxic"] if toxic else [])):
        table.add_column(name, justify="left" if name == "model" else "right")
    for one in found["systems"]:
        cells = [_cell(one["r_unsafe"]["share"]), _cell(one["r_safe"]["share"]), _cell(one["drift"]), _cell(one["reduction"])]
        table.add_row(Text(one["name"]), *cells, *([_cell(one["toxic"]["share"])] if toxic else []))
    return table


def _cell(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "–"
    value, low, high = (100 * interval[name] for name in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"
