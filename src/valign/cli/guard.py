"""``valign guard``: check and rewrite prompts, explain decisions; fit, calibrate and measure the trained head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from typer import Option

from valign.checks import UserError, close_to, option
from valign.cli.common import (
    AsJson,
    ChatOptions,
    GuardParts,
    PromptTableOptions,
    err,
    numbers_by_name,
    out,
    print_measured,
    resolve_model,
)
from valign.cli.early import refuse_pipeline
from valign.cli.guard_answer import ANSWER, answer_command
from valign.cli.guard_prompts import BLOCKED, File, Json, PolicyName, Prompts, given_prompts, print_line, table_layout
from valign.cli.options import configured, record, refuse_given

if TYPE_CHECKING:
    from valign.data.prompts.pairs import LabelledPrompt
    from valign.guard import Guard, GuardDecision, GuardResult
    from valign.models.encoders.hyperbolic_clip import HyperbolicClip
    from valign.models.heads.text_probe import TextProbe
    from valign.policy import Policy

CHUNK = 64  # prompts guarded at a time

app = typer.Typer(no_args_is_help=True, help="Check and rewrite prompts before an image model sees them.")

Rates = Annotated[
    list[str], Option(metavar="SOURCE=SHARE", help="the share for a source, such as deliberately alarming prompts; may be repeated")
]
Data = Annotated[list[Path], Option("--data", "-d", help="file or folder of labelled prompts; may be repeated")]


@dataclass(frozen=True, kw_only=True)
class GuardOptions(GuardParts):
    """Which guard."""

    policy: str = option("default", help="default, shapes, or a policy file", flags=("--policy", "-p"))
    threads: int = option(1, help="threads of torch that check a prompt; 0 is as many as torch takes", low=0)
    probe: Path | None = option(None, help="for the stage `probe`: a probe of `valign train retriever`, with its --model")
    model: str = option("", help="the model whose text encoders the probe reads with", flags=("--model", "-m"), needs={"probe": ()})
    config: str = option("", help="safety config in plain sentences, such as 'blocks violence in posters'", flags=("--config",))
    role: str = option(
        "",
        help="role of who wrote the config; only those that the policy names may loosen",
        flags=("--role",),
        needs={"config": ()},
    )

    hysac: Path | None = option(None, help="for the stage `hysac`: a folder of `valign train hysac`")

    def hyperbolic(self) -> HyperbolicClip | None:
        """The hyperbolic CLIP, if one was given."""
        if self.hysac is None:
            return None
        from valign.models.encoders.hyperbolic_clip import load_hyperbolic

        return load_hyperbolic(self.hysac)

    def text_probe(self) -> TextProbe | None:
        """The probe on its model. Raises: UserError if one of the two was left out, or the model is another."""
        if self.probe is None:
            return None
        if not self.model:
            raise UserError("--probe needs the model that it was fitted on, got none. Name it with --model.")
        from valign.models.heads.text_probe import load_probe

        return load_probe(self.probe, resolve_model(self.model))


GUARDED = configured(
    checks=dict.fromkeys(("--model", "-m"), refuse_pipeline), guard=GuardOptions, chat=ChatOptions, table=PromptTableOptions
)


@app.command("check", cls=GUARDED, epilog='example: valign guard check "a cat on a sofa" --json')
def check(
    ctx: typer.Context,
    prompts: Prompts = None,
    file: File = None,
    as_json: Json = False,
) -> None:
    """Say allow, rewrite or block, and why; nothing is rewritten. Exit code 3 if a prompt is blocked."""
    guard = _guard(ctx)
    blocked = False
    for _, decision in _decisions(guard, given_prompts(ctx, prompts, file)):
        blocked |= decision.blocked
        if as_json:
            print_line(decision.to_json(with_prompt=True))
        else:
            out.print(_line(decision), soft_wrap=True)
    raise typer.Exit(BLOCKED if blocked else 0)


@app.command("rewrite", cls=GUARDED, epilog='example: valign guard rewrite "oil painting of a battle" > safe.txt')
def rewrite(
    ctx: typer.Context,
    prompts: Prompts = None,
    file: File = None,
    as_json: Json = False,
) -> None:
    """Print each prompt as it may be generated, one a line; a blocked one gives an empty line. Exit code 3 if any is blocked."""
    guard = _guard(ctx)
    blocked = False
    for number, (prompt, decision) in enumerate(_decisions(guard, given_prompts(ctx, prompts, file)), start=1):
        result = guard.finish(decision, prompt)
        blocked |= result.blocked
        if as_json:
            print_line(result.to_json(with_prompt=True))
        else:
            out.print(result.prompt or "", markup=False, soft_wrap=True)
            if result.blocked:
                err.print(Text(f"Prompt {number} is blocked: {_why(decision)}", style="red"), soft_wrap=True)
    raise typer.Exit(BLOCKED if blocked else 0)


app.command("answer", **ANSWER)(answer_command)


@app.command("explain", cls=GUARDED, epilog='example: valign guard explain "no weapons allowed, painted on a poster"')
def explain(
    ctx: typer.Context,
    prompts: Prompts = None,
    file: File = None,
    as_json: Json = False,
) -> None:
    """Run every stage, also after the first finding, and show each verdict: words, score against threshold, the rewrite."""
    guard = _guard(ctx)
    blocked = False
    for prompt, decision in _decisions(guard, given_prompts(ctx, prompts, file), explain=True):
        result = guard.finish(decision, prompt)
        blocked |= result.blocked
        if as_json:
            print_line(result.to_json(with_prompt=True))
        else:
            _explain(prompt, result)
    raise typer.Exit(BLOCKED if blocked else 0)


@app.command(
    "fit",
    cls=configured(fit="valign.training.tasks.guard_head.fit:FitConfig", table=PromptTableOptions),
    epilog="example: valign guard fit --data prompts/ --rate overt=0.08 -o runs/head",
)
def fit(
    ctx: typer.Context,
    data: Data,
    folder: Annotated[Path, Option("--out", "-o", help="folder for head.safetensors, CARD.md and results.json")],
    policy: PolicyName = "default",
    limit: Annotated[int | None, Option(min=1, help="rows per source and label at most")] = None,
    leave_out: Annotated[list[str], Option(help="source kept for testing as a whole; may be repeated")] = [],  # noqa: B006
    target_fpr: Annotated[float, Option(help="share of harmless prompts that may be flagged, on every source")] = 0.01,
    rate: Rates = [],  # noqa: B006
    start: Annotated[Path | None, Option(help="head of the same shape to train further, or `shipped`")] = None,
    as_json: AsJson = False,
) -> None:
    """Train the head on labelled prompts, calibrate it on harmless ones that it did not see, and measure it."""
    from valign.data.prompts.labelled import read_rows
    from valign.guard.head.learned import SHIPPED
    from valign.models.encoders.minilm import MiniLM
    from valign.models.heads.prompt_head import load_head
    from valign.recipes.guard_head import fit_and_write
    from valign.training.tasks.guard_head.fit import FitConfig

    rules = _policy(policy)
    first = None if start is None else load_head(SHIPPED if start == Path("shipped") else start)
    rows = read_rows(data, rules, *table_layout(ctx))
    report = fit_and_write(
        rows,
        rules,
        folder,
        config=record(ctx, FitConfig),
        encoder=MiniLM(),
        target_fpr=target_fpr,
        rates=_rates(rate, rows),
        leave_out=leave_out,
        limit=limit,
        start=first,
    )
    _print_report({"head": str(folder / "head.safetensors"), "sources": report.sources}, "head", as_json=as_json)


@app.command(
    "fit-rewriter",
    cls=configured(fit="valign.training.tasks.rewriter.fit:RewriterConfig", table=PromptTableOptions),
    epilog="example: valign guard fit-rewriter --data prompts/coprov2 --data prompts/coco_captions -o runs/rewriter",
)
def fit_rewriter_(
    ctx: typer.Context,
    data: Data,
    folder: Annotated[Path, Option("--out", "-o", help="folder for the model and CARD.md; an interrupted fit goes on")],
    policy: PolicyName = "default",
    limit: Annotated[int | None, Option(min=1, help="rows per source and label at most")] = None,
    leave_out: Annotated[list[str], Option(help="source kept for testing as a whole; may be repeated")] = [],  # noqa: B006
    head: Annotated[Path | None, Option(help="the guard's head, by which words are chosen; the shipped one")] = None,
) -> None:
    """Train the rewriter that edits: on paired prompts (rows that share a `pair_id`) and harmless captions."""
    from valign.data.prompts.labelled import capped, read_rows
    from valign.guard.head.learned import SHIPPED
    from valign.models.encoders.minilm import MiniLM
    from valign.models.heads.prompt_head import load_head
    from valign.recipes.guard_rewriter import FILE, fit_rewriter
    from valign.training.tasks.rewriter.fit import RewriterConfig

    rules, config = _policy(policy), record(ctx, RewriterConfig)
    rows = capped(read_rows(data, rules, *table_layout(ctx)), limit, seed=config.seed)
    report = fit_rewriter(
        rows, rules, folder, config=config, encoder=MiniLM(), head=load_head(head or SHIPPED), leave_out=leave_out
    )
    err.print(f"{report.examples} paired prompts, {report.words} words, {report.size / 2**20:.1f} MiB", soft_wrap=True)
    out.print(str(folder / FILE), markup=False, soft_wrap=True)


@app.command(
    "calibrate",
    cls=configured(table=PromptTableOptions),
    epilog="example: valign guard calibrate --data my-prompts.jsonl --target-fpr 0.005 -o runs/head",
)
def calibrate(
    ctx: typer.Context,
    data: Data,
    folder: Annotated[Path, Option("--out", "-o", help="folder for the head with new thresholds")],
    head: Annotated[
        list[Path],
        Option(help="head made by `valign guard fit`; the shipped one; the weights of several of one seed are averaged"),
    ] = [],  # noqa: B006
    policy: PolicyName = "default",
    target_fpr: Annotated[float, Option(help="share of harmless prompts that may be flagged, on every source")] = 0.01,
    rate: Rates = [],  # noqa: B006
    held_out: Annotated[bool, Option(help="only what `fit` never trained on: sources left out, a tenth of the others")] = False,
    as_json: AsJson = False,
) -> None:
    """Set the head's thresholds from harmless prompts (label 0) of your own. Use prompts that it was not trained on."""
    from valign.data.prompts.labelled import read_rows, without_repeats
    from valign.guard.head.learned import SHIPPED
    from valign.models.encoders.minilm import MiniLM
    from valign.models.heads.prompt_head import average, load_head
    from valign.recipes.guard_head import TEST_FOLD, calibrate_and_write

    rules = _policy(policy)
    mean = average([load_head(path) for path in head or [SHIPPED]])
    whole = mean.settings.notes.get("left_out", [])  # sources that the fit saw nothing of
    every = without_repeats(read_rows(data, rules, *table_layout(ctx)))
    rows = [row for row in every if not held_out or row.fold == TEST_FOLD or row.source in whole]
    report = calibrate_and_write(mean, rows, rules, folder, encoder=MiniLM(), target_fpr=target_fpr, rates=_rates(rate, rows))
    _print_report({"head": str(folder / "head.safetensors"), "sources": report.sources}, "head", as_json=as_json)


@app.command("evaluate", cls=GUARDED, epilog="example: valign guard evaluate --data prompts/ -o runs/guard-report")
def evaluate(
    ctx: typer.Context,
    data: Data,
    folder: Annotated[Path, Option("--out", "-o", help="folder for results.json, report.md and roc.png")],
    held_out: Annotated[bool, Option(help="only the tenth of the groups that `fit` never trains on")] = False,
    limit: Annotated[int | None, Option(min=1, help="rows per source and label at most")] = None,
    disguises: Annotated[bool, Option(help="each prompt in each disguise, such as leetspeak; reported by disguise")] = False,
    rewrites: Annotated[int, Option(min=0, help="prompts to be rewritten whose rewrites are measured")] = 100,
    judge: Annotated[Path | None, Option(help="a second head, made by `valign guard fit`, that judges the rewrites")] = None,
    language_model: Annotated[
        Path | None, Option(help="folder of a causal language model, whose perplexity says how fluent rewrites are")
    ] = None,
    show_prompts: Annotated[
        bool, Option(help="print the worst prompts in the report, and the best and worst rewrites in rewrites.md")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the whole guard on labelled prompts: recall, false alarms, per category and stage, VALOR's metrics, worst errors."""
    from valign.data.prompts.disguise import in_every_disguise
    from valign.data.prompts.labelled import capped, read_rows
    from valign.evaluation.guards.page import write_guard_report
    from valign.models.heads.prompt_head import load_head
    from valign.models.language.perplexity import LanguageModel
    from valign.recipes.guard_head import TEST_FOLD, measure_guard

    if not rewrites:
        refuse_given(ctx, "without --rewrites", "judge", "language_model")
    guard = _guard(ctx)
    rows = [row for row in read_rows(data, guard.policy, *table_layout(ctx)) if not held_out or row.fold == TEST_FOLD]
    if not rows:
        raise UserError("--data must leave prompts to measure, got none in the held-out fold. Add data, or take --held-out out.")
    rows = capped(rows, limit, seed=0)
    rows = in_every_disguise(rows, seed=0) if disguises else rows
    second = None if judge is None else load_head(judge)
    language = None if language_model is None else LanguageModel(language_model)
    scored = measure_guard(guard, rows, rewrites=rewrites, judge=second, language=language)
    summary = write_guard_report(scored, folder, show_prompts=show_prompts)
    _print_report({"report": str(folder / "report.md"), **summary}, "report", as_json=as_json)


def _policy(name: str) -> Policy:
    from valign.policy import load_policy

    return load_policy(name)


def _rates(texts: Sequence[str], rows: Sequence[LabelledPrompt]) -> dict[str, float]:
    """``SOURCE=SHARE`` as a mapping. Raises: UserError for another form, or a source that the data lacks."""
    rates, known = numbers_by_name("--rate", texts), sorted({row.source for row in rows})
    for name in rates:
        if name not in known:
            raise UserError(
                f"--rate must name a source of the data, got {name!r}.{close_to(name, known)} Known: {', '.join(known)}."
            )
    return rates


def _guard(ctx: typer.Context) -> Guard:
    from valign.guard import Guard
    from valign.policy import read_guard_config

    options = record(ctx, GuardOptions)
    rules = _policy(options.policy)
    if "probe" not in rules.guard.stages:
        refuse_given(ctx, f"under the policy {rules.id}, which does not list the stage probe", "probe")
    chat, probe = record(ctx, ChatOptions).load(), options.text_probe()
    config = read_guard_config(rules, options.config, role=options.role) if options.config else None
    guard = Guard.from_policy(
        rules,
        head=options.head,
        probe=probe,
        hyperbolic=options.hyperbolic(),
        chat=chat,
        threads=options.threads,
        edits=options.edits,
    )
    return guard.with_config(config)


def _decisions(guard: Guard, prompts: Iterator[str], *, explain: bool = False) -> Iterator[tuple[str, GuardDecision]]:
    """Decisions in the order of the prompts, in batches. What is not a prompt is blocked, and `error` says why."""
    from valign.guard import GuardDecision

    while batch := list(islice(prompts, CHUNK)):
        why = [_mistake(guard, prompt) for prompt in batch]
        decisions = iter(guard.check_many([prompt for prompt, mistake in zip(batch, why) if not mistake], explain=explain))
        for prompt, mistake in zip(batch, why):
            yield prompt, GuardDecision(action="block", flagged=False, stop="", error=mistake) if mistake else next(decisions)


def _mistake(guard: Guard, prompt: object) -> str:
    """Why it cannot be guarded; "" for a prompt."""
    from valign.guard.waterfall import require_prompt

    try:
        require_prompt(guard.policy, prompt)
    except (TypeError, UserError) as error:
        return str(error)
    return ""


def _why(decision: GuardDecision) -> str:
    return decision.error or decision.stop


def _line(decision: GuardDecision) -> Text:
    colour = {"allow": "green", "rewrite": "yellow", "block": "red"}[decision.action]
    return Text("  ".join(filter(None, (decision.action, _why(decision), ", ".join(decision.categories)))), style=colour)


def _explain(prompt: str, result: GuardResult) -> None:
    table = Table("stage", "verdict", "category", "where", "score", "ms", "what", box=None, header_style="bold")
    keep = bool(result.decision.prompt)
    for one in result.decision.trace:
        where = prompt[slice(*one.span)] if one.span and keep else ""
        score = "" if one.score is None else f"{one.score:.3f}"
        limit = "" if one.threshold is None else f" of {one.threshold:.3f}"
        table.add_row(
            one.stage, one.outcome, one.category, Text(where), score + limit, f"{one.milliseconds:.1f}", Text(one.message)
        )
    out.print(table)
    for attempt in result.attempts:
        out.print(Text(f"{attempt.source} ({attempt.role}): {attempt.reason or 'accepted'}", style="dim"))
    out.print(_line(result.decision), soft_wrap=True)
    if result.prompt is not None:
        out.print(result.prompt, markup=False, soft_wrap=True)


def _print_report(measured: dict[str, Any], path: str, *, as_json: bool) -> None:
    """A row per source on stderr, and on stdout the path of that name, or all that was measured."""
    _print_sources(measured["sources"])
    print_measured(measured, str(measured[path]), as_json=as_json)


def _print_sources(sources: list[dict[str, Any]]) -> None:
    table = Table("source", "unsafe", "recall %", "safe", "false alarms %", "AUROC")
    for one in sources:
        recall, alarms, area = one["recall"], one["false_alarms"], one["auroc"]
        table.add_row(
            one["source"],
            str(one["unsafe"]),
            f"{recall['value']:.1%}" if recall else "-",
            str(one["safe"]),
            f"{alarms['value']:.1%}" if alarms else "-",
            f"{area['value']:.3f} ({one['against']})" if area else "-",
        )
    err.print(table)
