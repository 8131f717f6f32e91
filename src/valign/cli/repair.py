"""``valign repair``: the smallest realignment of a drifted model that passes ``valign check``."""

import sys
from pathlib import Path
from typing import Annotated

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from typer import Context, Option

from valign.cli.common import err, example, out
from valign.cli.judges import MeasuredJudgeOptions
from valign.cli.options import configured, record


@example(
    "valign repair --base chat:base --before chat --after runs/drifted --policy chat -o runs/repaired",
    cls=configured(
        check="valign.recipes.check:CheckOptions",
        limits="valign.evaluation.checking.decision:DriftLimits",
        judging=MeasuredJudgeOptions,
    ),
)
def command(
    ctx: Context,
    base: Annotated[str, Option(help="the model before its safety training, and under adapters")],
    before: Annotated[str, Option(help="the aligned model: a folder, an adapter, or chat")],
    after: Annotated[str, Option(help="the drifted model or adapter")],
    policy: Annotated[str, Option("--policy", "-p", help="policy of the check")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of the repaired weights and of what was tried; resumed")],
    method: Annotated[list[str], Option(help="resta, enchtable or safe-lora; repeatable; all if left out")] = [],  # noqa: B006
    refine: Annotated[int, Option(min=0, help="halvings between the last strength that failed and the first that passed")] = 2,
    suite: Annotated[str, Option("--suite", "-s", help="table of prompts with labels; the policy's own if left out")] = "",
    detector: Annotated[list[str], Option(help="who judges a diffusion model's images; repeatable")] = [],  # noqa: B006
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Give a drifted model its safety back by the smallest change that passes the check. Exit code 1 if nothing passes."""
    from valign.evaluation.checking.decision import DriftLimits
    from valign.policy import load_policy
    from valign.recipes.check import CheckOptions
    from valign.recipes.repair import repair

    judging = record(ctx, MeasuredJudgeOptions)
    found = repair(
        before,
        after,
        load_policy(policy),
        folder,
        base=base,
        methods=method,
        refine=refine,
        limits=record(ctx, DriftLimits),
        options=record(ctx, CheckOptions),
        suite=suite,
        judge=judging.resolve(),
        judge_labels=judging.judge_labels,
        detector=detector,
        device=device,
    )
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("method", "strength", "moved", "verdict"):
        table.add_column(name, justify="right" if name in ("strength", "moved") else "left")
    for one in found["attempts"]:
        table.add_row(one["method"], f"{one['strength']:g}", f"{one['moved']:.3f}", one["verdict"])
    err.print(table)
    err.print(Text(f"Before the repair: {found['start']['verdict']}. {found['start']['reason']}"))
    err.print(Text(f"{found['outcome']}{': ' + found['best']['reason'] if found['best'] else ''}", style="bold"))
    out.print(str(folder / ("report.html" if found["best"] else "repair.json")), soft_wrap=True)
    sys.exit(1 if found["outcome"] == "nothing passes" else 0)
