"""``valign repair``: the smallest realignment of a drifted model that passes ``valign check``."""

import sys
from pathlib import Path
from typing import Annotated

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from typer import Context, Option

from valign.cli.check import refuse_idle_checking
from valign.cli.common import Anyway, AsJson, PromptTableOptions, err, example, one_of, print_measured
from valign.cli.early import refuse_subject
from valign.cli.judges import MeasuredJudgeOptions
from valign.cli.options import configured, record, refuse_given

SOMF = "Of the method somf"  # panel of the help


@example(
    "valign repair --base chat:base --before chat --after runs/drifted --policy chat -o runs/repaired   "
    "a diffusion model: valign repair --base shapes --before runs/expert --after runs/tuned --policy shapes -o runs/repaired",
    cls=configured(
        checks={"--base": refuse_subject},
        check="valign.recipes.check:CheckOptions",
        limits="valign.evaluation.checking.decision:DriftLimits",
        sampling="valign.interfaces:SamplingConfig",
        judging=MeasuredJudgeOptions,
        named={"--method": ("valign.recipes.repair:LADDERS",)},
        table=PromptTableOptions,
    ),
)
def command(
    ctx: Context,
    base: Annotated[str, Option(help="the model before its safety training, and under adapters")],
    before: Annotated[str, Option(help="the aligned model: a folder, an adapter, or chat")],
    after: Annotated[str, Option(help="the drifted model or adapter")],
    policy: Annotated[str, Option("--policy", "-p", help="policy of the check")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of the repaired weights and of what was tried; resumed")],
    start: Annotated[
        str,
        Option(
            help="what the drifted one was fine-tuned from: aligned (the model before) or base",
            callback=one_of("--start", "aligned", "base"),
        ),
    ] = "aligned",
    method: Annotated[list[str], Option(help="somf, resta, enchtable or safe-lora; repeatable; all if left out")] = [],  # noqa: B006
    refine: Annotated[int, Option(min=0, help="halvings between the last strength that failed and the first that passed")] = 2,
    pairs: Annotated[
        Path | None,
        Option(
            help="safety preferences that SOMF learns on, as `valign realign somf` takes them; a world's own if left out",
            rich_help_panel=SOMF,
        ),
    ] = None,
    mask_steps: Annotated[int, Option(min=1, help="optimizer steps of SOMF's mask", rich_help_panel=SOMF)] = 60,
    suite: Annotated[str, Option("--suite", "-s", help="table of prompts with labels; the policy's own if left out")] = "",
    detector: Annotated[list[str], Option(help="who judges a diffusion model's images; repeatable")] = [],  # noqa: B006
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    anyway: Anyway = False,
    as_json: AsJson = False,
) -> None:
    """Give a drifted model its safety back by the smallest change that passes the check. Exit code 1 if nothing passes."""
    from valign.evaluation.chats.judges import ANSWER_COLUMNS
    from valign.evaluation.checking.decision import DriftLimits
    from valign.interfaces import SamplingConfig
    from valign.merging.realign.preferences import PAIR_COLUMNS
    from valign.policy import load_policy
    from valign.recipes.check import CheckOptions
    from valign.recipes.repair import repair

    if method and "somf" not in method:
        refuse_given(ctx, "without --method somf", "pairs", "mask_steps")
    refuse_idle_checking(ctx, before, after, base, suite)
    judging, table = record(ctx, MeasuredJudgeOptions), record(ctx, PromptTableOptions)
    reading = table.reading(also=(*PAIR_COLUMNS, *ANSWER_COLUMNS))
    found = repair(
        before,
        after,
        load_policy(policy),
        folder,
        base=base,
        start=start,  # type: ignore[arg-type]
        methods=method,
        refine=refine,
        pairs=pairs,
        pairs_reading=reading.beside("pairs") if suite else reading.without(ANSWER_COLUMNS),
        mask_steps=mask_steps,
        sampling=record(ctx, SamplingConfig),
        limits=record(ctx, DriftLimits),
        options=record(ctx, CheckOptions),
        suite=suite,
        reading=reading.without(PAIR_COLUMNS),
        layout=table.format,
        judge=judging.resolve(),
        judge_labels=judging.judge_labels,
        detector=detector,
        device=device,
        anyway=anyway,
    )
    attempts = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("method", "strength", "moved", "kept", "verdict"):
        attempts.add_column(name, justify="right" if name in ("strength", "moved", "kept") else "left")
    for one in found["attempts"]:
        kept = "" if one["kept"] is None else f"{one['kept']:.3f}"
        attempts.add_row(one["method"], f"{one['strength']:g}", f"{one['moved']:.3f}", kept, one["verdict"])
    err.print(attempts)
    err.print(Text(f"Before the repair: {found['start']['verdict']}. {found['start']['reason']}"))
    if found["best"] and (found["best"]["kept"] or 0) < 0.5:
        err.print(Text("Less than half of the fine-tuning is left in the result: measure what it still can.", style="yellow"))
    err.print(Text(f"{found['outcome']}{': ' + found['best']['reason'] if found['best'] else ''}", style="bold"))
    print_measured(found, str(folder / ("report.html" if found["best"] else "repair.json")), as_json=as_json)
    sys.exit(1 if found["outcome"] == "nothing passes" else 0)
