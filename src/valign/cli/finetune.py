"""``valign finetune``: one model, one task, one method."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Context, Option

from valign.checks import UserError, check_choice, option
from valign.cli.common import TableOptions, example, out, resolve_model
from valign.cli.options import configured, record, rest_of


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """Which rows and columns of the data, and how they are read."""

    held_out: Path | None = option(None, help="table to judge by; without one, a tenth of the data")
    text: tuple[str, ...] = option((), help="column of the text; twice for pairs, or for prompt and answer; of the caption")
    target: str = option("label", help="column of the class or the number")
    image: str = option(
        "file_name", help="column of the image's file, from the table's folder; for diffusion", flags=("--image", "--picture")
    )
    score: str = option("", help="what chooses the best step: accuracy, matthews, f1, spearman or pearson")
    max_tokens: int = option(128, help="texts are cut here", low=4)
    pairs: str | None = option(None, help="how pairs of texts are read; default by model", choices=("together", "apart"))
    skip_unreadable: bool = option(False, help="leave out images that cannot be read instead of stopping")
    buckets: bool = option(True, help="images keep about their shape; off: all are cropped square")
    train_rows: int | None = option(None, help="use only so many training rows, chosen by the seed", low=1)


@example(
    "valign finetune --model minilm --task sst2 --data glue --adapter ailora --set rank=4 --out runs/sst2   "
    "own data: valign finetune --model FOLDER --task classification --data train.csv --text review --target stars "
    "--adapter lora --out runs/stars   "
    "a language model: valign finetune --model FOLDER --task causal-lm --data pairs.jsonl --text ask --text answer --adapter pissa "
    "--out runs/lm   "
    "a diffusion model: valign finetune --model shapes --task diffusion --data images --adapter lora --out runs/style",
    cls=configured(
        rest="the adapter's own, such as rank=4 or learning_rate=1.0e-3",
        columns=ColumnOptions,
        table=TableOptions,
        training="valign.training.tasks.supervised.config:SupervisedConfig",
    ),
)
def command(
    ctx: Context,
    model: Annotated[
        str,
        Option("--model", "-m", help="minilm, shapes, or a folder or hub id: of a transformers model, or a pipeline"),
    ],
    task: Annotated[
        str, Option("--task", "-t", help="cola, sst2, mrpc, rte, stsb, classification, regression, causal-lm or diffusion")
    ],
    data: Annotated[Path, Option("--data", "-d", help="table (csv, tsv, jsonl, parquet) or folder with train and dev in it")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of the run; an unfinished one is resumed")],
    adapter: Annotated[
        str, Option("--adapter", "-a", help="ADAPTER[+OPTIMIZER][+PERTURBATION], e.g. lora, full+dct-adamw or lora+mgpo")
    ] = "lora",
    targets: Annotated[
        list[str], Option(help="ending of linear modules to adapt, e.g. query; repeatable; default by architecture")
    ] = [],  # noqa: B006
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Fine-tune a transformers model on labelled texts, or a diffusion model on images, with any adapter of the package or its
    baselines. The same command resumes."""
    from dataclasses import asdict

    from valign.data.tasks.base import SCORES
    from valign.data.tasks.captions import CaptionTask, read_captions
    from valign.data.tasks.texts import GLUE, read_data
    from valign.models.heads.task_model import Target, TaskModel
    from valign.models.language.text_model import load_text_model
    from valign.training.engine.tuning import parse_tuning
    from valign.training.tasks.supervised import DiffusionTaskModel, SupervisedConfig, finetune

    check_choice("--task", task, (*GLUE, *SCORES))
    columns, config = record(ctx, ColumnOptions), record(ctx, SupervisedConfig)
    tuning = parse_tuning(adapter, rest_of(ctx))
    reading = record(ctx, TableOptions).reading()
    rows: dict[str, Any] = {"train_rows": columns.train_rows, "seed": config.seed, "reading": reading}
    if task == "diffusion":
        if len(columns.text) > 1:
            raise UserError(f"--text must be the one column of captions, got {', '.join(columns.text)}. Give it once.")
        check_choice("--score of diffusion", columns.score or "loss", ("loss",))
        captioned = CaptionTask(
            name=task, kind="diffusion", score=columns.score, image=columns.image, caption=(*columns.text, "text")[0]
        )
        found = read_captions(captioned, data, columns.held_out, skip_unreadable=columns.skip_unreadable, **rows)
        subject: TaskModel = DiffusionTaskModel(
            resolve_model(model, device=device, dtype="float32"),  # type: ignore[arg-type]
            buckets=columns.buckets,
        )
    else:
        chosen, place = _text_task(task, data, columns)
        found = read_data(chosen, place, columns.held_out, **rows)
        subject = load_text_model(
            model,
            Target.of(found),
            pairs=columns.pairs,  # type: ignore[arg-type]
            max_tokens=columns.max_tokens,
            seed=config.seed,
            device=device,
        )
    result = finetune(subject, found, folder, tuning, config, targets=tuple(targets), label=f"{tuning.name} on {task}")
    out.print_json(data=asdict(result))


def _text_task(name: str, data: Path, columns: ColumnOptions) -> tuple[Any, Path]:
    """A named task and its folder, or one of the user's own columns."""
    from valign.data.tasks.texts import GLUE, TextTask, named_task

    if name not in GLUE:
        target = "" if name == "causal-lm" else columns.target
        return TextTask(name=name, kind=name, score=columns.score, texts=columns.text or ("text",), target=target), data  # type: ignore[arg-type]
    if columns.text:
        raise UserError(f"--text must not be given for {name}, which names its columns itself. Use --task classification.")
    return named_task(name, data)
