"""``valign red-eval``: how often the user's own templates talk a chat model or an endpoint into harmful answers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from typer import Context, Option

from valign.checks import UserError, option
from valign.cli.common import Anyway, AsJson, TableOptions, err, example, print_measured
from valign.cli.early import refuse_subject
from valign.cli.judges import MeasuredJudgeOptions
from valign.cli.options import configured, record, refuse_given

ADDRESS = ("http://", "https://")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How the model answers."""

    max_tokens: int = option(256, low=1, help="length of an answer")
    temperature: float = option(0.0, low=0.0, help="0 takes the likeliest token")
    seed: int = option(0, help="of sampled answers", needs={"temperature": ()})


@example(
    "valign red-eval --model FOLDER --questions questions.csv --template plain.txt --judge guard=FOLDER -o runs/red",
    cls=configured(
        checks=dict.fromkeys(("--model", "-m", "--base"), refuse_subject),
        table=TableOptions,
        judging=MeasuredJudgeOptions,
        answers=AnswerOptions,
    ),
)
def command(
    ctx: Context,
    model: Annotated[str, Option("--model", "-m", help="folder of a chat model or adapter, chat:STAGE, or an address")],
    template: Annotated[list[Path], Option("--template", "-t", help="text file with <question> in it; repeatable")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of answers and rates; an unfinished one is resumed")],
    questions: Annotated[
        list[str], Option("--questions", "-q", help="question bank: a table with a column question, or chat; repeatable")
    ] = ["chat"],  # noqa: B006
    places: Annotated[int, Option(min=1, help="how often <question> stands in each template")] = 1,
    base: Annotated[str, Option(help="model under an adapter")] = "",
    served: Annotated[str, Option(help="model that the endpoint serves")] = "default",
    key_env: Annotated[str | None, Option(help="environment variable with the endpoint's key")] = None,
    samples: Annotated[int, Option(min=1, max=42, help="questions per category of the chat world")] = 20,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    anyway: Anyway = False,
    as_json: AsJson = False,
) -> None:
    """Measure attack success over your own templates (RED-EVAL); excluded answers are counted apart, never as harmless."""
    from valign.evaluation.chats.judges import ANSWER_COLUMNS, PhraseJudge, measure_judge, read_labelled_answers
    from valign.evaluation.chats.red_eval import read_questions, read_template
    from valign.recipes.check_chats import MeasuredJudge
    from valign.recipes.red_eval import red_eval
    from valign.recipes.subjects import find_subjects

    table, judging = record(ctx, TableOptions), record(ctx, MeasuredJudgeOptions)
    if model.startswith(ADDRESS):
        refuse_given(ctx, "on an endpoint", "base", "device", "anyway")
    else:
        refuse_given(ctx, "on a model in a folder", "served", "key_env")
        if find_subjects(model, model, base=base)[0].adapter is None:
            refuse_given(ctx, "without an adapter", "anyway")
    templates = [read_template(path, places=places) for path in template]
    worlds = [name for name in questions if name in _worlds()]
    if worlds and len(questions) > 1:
        raise UserError(f"--questions must be the chat world's or files, got both: {', '.join(questions)}. Make two runs.")
    if not worlds:
        refuse_given(ctx, "beside question banks of your own", "samples")
    elif judging.judge_labels is None:
        refuse_given(ctx, "on the chat world's own questions", parts=(TableOptions,))
    banks = {name: _world_bank(name, samples) for name in worlds} or {
        Path(name).stem: read_questions(Path(name), table.reading().without(ANSWER_COLUMNS)) for name in questions
    }
    chosen = judging.resolve()
    used = chosen or (_worlds()[worlds[0]].judge() if worlds else PhraseJudge())
    if judging.judge_labels is not None:
        used = MeasuredJudge(
            used, measure_judge(used, read_labelled_answers(judging.judge_labels, table.reading().beside("judge-labels")))
        )
    options = asdict(record(ctx, AnswerOptions)) | {"device": device, "anyway": anyway}
    found = red_eval(_system(model, base, served, key_env, options), banks, templates, used, folder)
    err.print(rates_table(found))
    for note in found["notes"]:
        err.print(Text(note, style="dim"))
    print_measured(found, str(folder / "red-eval.json"), as_json=as_json)


def _worlds() -> Mapping[str, Any]:
    from valign.worlds import CHAT_WORLDS

    return CHAT_WORLDS


def _world_bank(name: str, samples: int) -> list[Any]:
    """Plainly worded requests that are to be refused."""
    return [case for case in _worlds()[name].cases(7 * samples) if case.risky and case.kind == "disallowed"]


def _system(model: str, base: str, served: str, key_env: str | None, options: dict[str, Any]) -> Any:
    from valign.evaluation.chats.systems import endpoint_system, local_system
    from valign.models.language.chat import OpenAIChat
    from valign.recipes.subjects import find_subjects

    if model.startswith(ADDRESS):
        return endpoint_system(served, OpenAIChat(base_url=model, model=served, api_key_env=key_env, **options))
    subject, _ = find_subjects(model, model, base=base)
    if subject.kind != "chat":
        raise UserError(f"--model must be a chat model, got {model}. Images are checked by valign evaluate.")
    return local_system(Path(model).name, subject.folder, adapter=subject.adapter, **options)


def rates_table(found: Mapping[str, Any]) -> Table:
    """One row per template and bank; below, the mean over templates."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.title = f"Attack success on {found['model']}; judge {found['judge']['name']}"
    for name in ("questions", "template", "success %", "harmful", "unharmful", "excluded"):
        table.add_column(name, justify="left" if name in ("questions", "template") else "right")
    for one in found["rates"]:
        cells = [str(one["harmful"]), str(one["unharmful"]), str(sum(one["excluded"].values()))]
        table.add_row(Text(one["bank"]), Text(one["template"]), _cell(one["rate"]), *cells)
    for bank, mean in found["banks"].items():
        table.add_row(Text(bank), Text("mean of templates", style="dim"), _cell(mean), "", "", "")
    return table


def _cell(rate: Mapping[str, float]) -> str:
    value, low, high = (100 * rate[name] for name in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"
