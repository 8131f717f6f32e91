"""``valign check``: was safety lost between two models? Safe, drifted, undecided or error, as an exit code and a report."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from typer import Context, Exit, Option

from valign.cli.common import Anyway, PromptTableOptions, err, example, out
from valign.cli.early import refuse_subject
from valign.cli.judges import MeasuredJudgeOptions
from valign.cli.options import configured, record, refuse_given

ERROR = 3  # exit code: nothing can be said


class _Check(
    configured(  # type: ignore[misc]
        checks={"--base": refuse_subject},
        check="valign.recipes.check:CheckOptions",
        limits="valign.evaluation.checking.decision:DriftLimits",
        sampling="valign.interfaces:SamplingConfig",
        table=PromptTableOptions,
        judging=MeasuredJudgeOptions,
    )
):
    """The command's own exit code for whatever goes wrong: 1 and 2 are verdicts, and must not be mistaken for one."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().make_context(*args, **kwargs)
        except (ValueError, OSError) as error:
            raise _failed(error) from error
        except Exception as error:
            raise _with_code(error) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exit:
            raise
        except Exception as error:  # out of memory is an error, too, and not "drifted"
            if os.environ.get("VALIGN_DEBUG") == "1":
                raise
            _write_error(ctx.params, error)
            raise _failed(error) from error


def _with_code(error: Exception) -> Exception:
    """A mistake on the command line, which typer would end with 2."""
    if not isinstance(error, Exit) and hasattr(error, "exit_code"):
        error.exit_code = ERROR
    return error


def _failed(error: Exception) -> SystemExit:
    err.print(Text(_words(error), style="red"), soft_wrap=True)
    return SystemExit(ERROR)


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'A file'}: {error.strerror}. Check the path, its permissions and the free space."
    text = str(error) or "no message; VALIGN_DEBUG=1 shows where"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _write_error(params: Mapping[str, Any], error: Exception) -> None:
    """The result of a check that came to none, where others look for one. A check that is there stays."""
    from json import dumps

    from valign.evaluation.checking.junit import write_junit

    result = {"verdict": "error", "reason": _words(error), "exit_code": ERROR, "needed": None, "decision": None}
    folder = params["folder"]
    if not (folder / "check.json").exists():
        try:
            write_junit(folder / "junit.xml", result)
        except (OSError, ValueError):
            err.print(Text(f"{folder} cannot be written, so it holds no junit.xml.", style="dim"))
    if params.get("json"):
        print(dumps(result, indent=2))


@example(
    "valign check --before chat --after runs/chat --policy chat --max-drift 0.02 -o runs/check   "
    "a pipeline and an adapter: valign check --before shapes --after runs/style --policy shapes -o runs/check-style",
    cls=_Check,
)
def command(
    ctx: Context,
    before: Annotated[
        str,
        Option(help="the model before: folder of a chat model, a pipeline, an adapter or its run; shapes, chat, chat:base ..."),
    ],
    after: Annotated[str, Option(help="the same after the change")],
    folder: Annotated[
        Path, Option("--out", "-o", help="folder for answers, report, check.json and junit.xml; resumed if unfinished")
    ],
    policy: Annotated[str, Option("--policy", "-p", help="policy whose categories count: chat, shapes, default or a file")],
    base: Annotated[str, Option(help="model under the adapters; the other side's if left out")] = "",
    suite: Annotated[str, Option("--suite", "-s", help="table of prompts with labels; the policy's own if left out")] = "",
    refusal: Annotated[list[str], Option(help="further words with which a refusal begins, for the judge phrases; repeatable")] = [],  # noqa: B006
    detector: Annotated[
        list[str], Option(help="who judges a diffusion model's images; a world's oracle for its own; repeatable")
    ] = [],  # noqa: B006
    trained_on: Annotated[
        list[Path], Option(help="data set or prompt file that must not overlap with the prompts; repeatable")
    ] = [],  # noqa: B006
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    anyway: Anyway = False,
    json: Annotated[bool, Option("--json", help="print the result as JSON on stdout")] = False,
) -> None:
    """Say whether safety was lost between two models, on the same prompts. Exit codes: 0 safe, 1 drifted, 2 undecided, 3 error."""
    from json import dumps

    from valign.evaluation.chats.judges import ANSWER_COLUMNS
    from valign.evaluation.checking.decision import DriftLimits
    from valign.interfaces import SamplingConfig
    from valign.policy import load_policy
    from valign.recipes.check import CheckOptions, check

    refuse_idle_checking(ctx, before, after, base, suite)
    table, judging = record(ctx, PromptTableOptions), record(ctx, MeasuredJudgeOptions)
    result = check(
        before,
        after,
        load_policy(policy),
        folder,
        base=base,
        suite=suite,
        reading=table.reading(also=ANSWER_COLUMNS),
        layout=table.format,
        judge=judging.resolve(tuple(refusal)),
        judge_labels=judging.judge_labels,
        detector=detector,
        limits=record(ctx, DriftLimits),
        options=record(ctx, CheckOptions),
        sampling=record(ctx, SamplingConfig),
        trained_on=_texts(trained_on, table),
        device=device,
        anyway=anyway,
    )
    if json:
        print(dumps(result, indent=2))
    else:
        print_check(result, folder)
    sys.exit(result["exit_code"])


def refuse_idle_checking(ctx: Context, before: str, after: str, base: str, suite: str) -> None:
    """Refuse options that do nothing for these models and prompts, by the models' files alone."""
    from dataclasses import fields

    from valign.interfaces import SamplingConfig
    from valign.recipes.subjects import find_subjects

    sides = find_subjects(before, after, base=base)
    images = ("detector", *(item.name for item in fields(SamplingConfig) if item.name != "seed"))
    answers = ("max_tokens", "answer_batch", "judge", "judge_labels", "refusal")
    kind = sides[0].kind
    refuse_given(ctx, f"on a {kind} model", *(images if kind == "chat" else answers))
    if suite:
        refuse_given(ctx, "beside --suite", "samples")
    if all(side.adapter is None for side in sides):
        refuse_given(ctx, "without an adapter", "anyway")


def _texts(sources: list[Path], table: PromptTableOptions) -> list[str]:
    """All texts that were trained on."""
    from valign.data.prompts.pairs import load_pairs
    from valign.data.prompts.records import prompt_texts
    from valign.evaluation.chats.judges import ANSWER_COLUMNS

    found: list[str] = []
    for source in sources:
        pairs = source / "prompts" / "pairs.parquet" if source.is_dir() else source
        if pairs.name == "pairs.parquet":
            found += [text for pair in load_pairs(pairs) for text in (pair.unsafe, pair.safe)]
        else:
            found += prompt_texts(source, reading=table.reading(also=ANSWER_COLUMNS).beside("trained-on"))
    return found


def print_check(result: Mapping[str, Any], folder: Path) -> None:
    """The verdict and its numbers on stderr, the report's path on stdout."""
    decision = result["decision"]
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column, side in (
        ("", "left"),
        ("before %", "right"),
        ("after %", "right"),
        ("rise, points", "right"),
        ("prompts", "right"),
    ):
        table.add_column(column, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for name in ("harm", "refusals", "coherence"):
        one = decision[name]
        shares = [100 * (one[side]["corrected"] or one[side]["share"])["value"] for side in ("before", "after")]
        low, value, high = (100 * one["drift"][key] for key in ("low", "value", "high"))
        title = {"harm": "harm complied with", "refusals": "harmless refused", "coherence": "incoherent"}[name]
        table.add_row(title, *(f"{share:.1f}" for share in shares), f"{value:+.1f} [{low:+.1f}, {high:+.1f}]", str(one["pairs"]))
    err.print(table)
    style = {"safe": "bold green", "drifted": "bold red"}.get(result["verdict"], "bold yellow")
    err.print(Text.assemble((result["verdict"], style), f": {result['reason']}"))
    for note in (*decision["notes"], *result["notes"]):
        err.print(Text(note, style="dim"))
    out.print(str(folder / "report.html"), soft_wrap=True)
