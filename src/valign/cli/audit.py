"""``valign audit``: how brittle is a model's safety, before it is released? One command per audit."""

from pathlib import Path
from typing import Annotated, Any

from rich.text import Text
from typer import Context, Option, Typer

from valign.checks import UserError
from valign.cli.common import TableOptions, err, out
from valign.cli.options import configured, record, rest_of

app = Typer(no_args_is_help=True, help="How brittle a model's safety is, before it is released.")


@app.callback()
def audit() -> None:
    """How brittle a model's safety is, before it is released."""


@app.command(
    cls=configured(
        rest="the adapter's own and the objectives', such as dropout=0.05 or agl.lambda_A=1",
        grid="valign.audits.fragility:FragilityGrid",
        table=TableOptions,
    ),
    epilog="example: valign audit fragility -m FOLDER -d chats.jsonl -s requests.jsonl --max-minutes 120 -o runs/fragility",
)
def fragility(
    ctx: Context,
    model: Annotated[str, Option("--model", "-m", help="folder of a chat model, or chat")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of numbers and report; an unfinished sweep is resumed")],
    data: Annotated[
        str, Option("--data", "-d", help="benign chats, as valign finetune takes them; of chat one of its new skills")
    ] = "",
    suite: Annotated[str, Option("--suite", "-s", help="held-out requests with labels; the chat world's for chat")] = "",
    adapter: Annotated[str, Option("--adapter", "-a", help="ADAPTER[+OPTIMIZER][+PERTURBATION]")] = "lora",
    preserve: Annotated[str, Option(help="objectives that keep safety, joined by +: the audit of a defence")] = "",
    calibration: Annotated[Path | None, Option(help="rows that the objectives read, as valign finetune takes them")] = None,
    judge: Annotated[str, Option(help="who judges answers, as valign check takes it")] = "",
    judge_model: Annotated[str, Option(help="model that the judge's endpoint serves")] = "default",
    judge_key_env: Annotated[str | None, Option(help="environment variable with the endpoint's key")] = None,
    samples: Annotated[int, Option(min=10, max=300, help="requests per kind of the chat world")] = 100,
    answer_tokens: Annotated[int, Option(min=1, help="length of an answer")] = 128,
    max_tokens: Annotated[int, Option(min=4, help="of a training chat")] = 512,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Fine-tune a chat model on harmless data at 12 settings or more, and report what its refusals become. No weights are left."""
    from valign.audits.chat_fragility import audit_chat
    from valign.audits.fragility import FragilityGrid
    from valign.cli.check import resolve_judge
    from valign.data.chats import read_chats
    from valign.data.tasks.base import Task, assemble
    from valign.evaluation.chats.cases import suite_cases
    from valign.evaluation.chats.judges import PhraseJudge
    from valign.evaluation.suite_files import read_suite
    from valign.recipes.subjects import find_subjects
    from valign.training.engine.tuning import parse_tuning
    from valign.training.tasks.preserving import PreserveData, parse_preserving
    from valign.worlds import CHAT_WORLDS

    reading, world = record(ctx, TableOptions).reading(), CHAT_WORLDS.get(model.partition(":")[0])
    subject, _ = find_subjects(model, model)
    if subject.kind != "chat" or subject.adapter is not None:
        raise UserError(f"--model must be a whole chat model, got {model}. Merge an adapter first.")
    if world is None and not (data and suite):
        raise UserError("--data and --suite must name benign chats and held-out requests, got nothing. They go with any own model.")
    objectives, rest = parse_preserving(preserve, rest_of(ctx))
    if calibration is not None and not objectives:
        raise UserError("--calibration must go with --preserve, whose objectives read it. Name one, or leave it out.")

    def chats(of: Any) -> Any:
        """Benign chats as the model renders them; a world's task by its name."""
        from valign.data.chats.conversation import Conversation

        if world is not None and not Path(data or "nowhere").exists():
            listed = world.grammar().task_chats(data or "counting", 400, 0)
            rows = [Conversation(tuple((turn["role"], turn["content"]) for turn in chat)) for chat in listed]
        else:
            rows = read_chats(Path(data), reading)
        return assemble(
            Task(name="chat", kind="chat"), data, of.fitting(rows), [], share=0.1, held_out_rows=None, train_rows=None, seed=0
        )

    cases = suite_cases(read_suite(suite)) if suite else world.cases(samples) if world else []
    named = resolve_judge(judge, model=judge_model, key_env=judge_key_env, refusals=[])
    found = audit_chat(
        subject.folder,
        chats,
        cases,
        named or (PhraseJudge() if suite or world is None else world.judge()),
        record(ctx, FragilityGrid),
        parse_tuning(adapter, rest),
        folder,
        preserve=objectives,
        beside=PreserveData(calibration=tuple(read_chats(calibration, reading.beside()))) if calibration else None,
        max_tokens=max_tokens,
        answer_tokens=answer_tokens,
        device=device,
    )
    worst = found["worst"]
    if worst is not None:
        value, low, high = (100 * worst["drop"][key] for key in ("value", "low", "high"))
        before = f"{100 * found['start']['refused']:.1f} % of risky requests refused before"
        err.print(Text(f"{before}; at worst {value:.1f} points fewer [{low:.1f}, {high:.1f}]", style="bold"))
    out.print(str(folder / "report.html"), soft_wrap=True)
