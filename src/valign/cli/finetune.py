"""``valign finetune``: one model, one task, one method."""

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from valign.checks import UserError, check_choice
from valign.cli.common import example, out, resolve_model, setting


@example(
    "valign finetune --model minilm --task sst2 --data glue --adapter ailora --set rank=4 --out runs/sst2   "
    "own data: valign finetune --model FOLDER --task classification --data train.csv --text review --target stars "
    "--adapter lora --out runs/stars   "
    "a language model: valign finetune --model FOLDER --task causal-lm --data pairs.jsonl --text ask --text answer --adapter pissa "
    "--out runs/lm   "
    "a diffusion model: valign finetune --model shapes --task diffusion --data images --adapter lora --out runs/style"
)
def command(
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
    held_out: Annotated[Path | None, Option(help="table to judge by; without one, a tenth of the data")] = None,
    text: Annotated[list[str], Option(help="column of the text; twice for pairs, or for prompt and answer; of the caption")] = [],  # noqa: B006
    target: Annotated[str, Option(help="column of the class or the number")] = "label",
    picture: Annotated[str, Option(help="column of the image's file, from the table's folder; for diffusion")] = "file_name",
    score: Annotated[str, Option(help="what chooses the best step: accuracy, matthews, f1, spearman or pearson")] = "",
    set_: Annotated[
        list[str], Option("--set", metavar="NAME=VALUE", help="an option of the method, e.g. rank=4 or learning_rate=1.0e-3")
    ] = [],  # noqa: B006
    targets: Annotated[
        list[str], Option(help="ending of linear modules to adapt, e.g. query; repeatable; default by architecture")
    ] = [],  # noqa: B006
    steps: Annotated[int, Option(min=1, help="optimizer steps at most")] = 300,
    batch_size: Annotated[int, Option(min=1, help="rows per step")] = 16,
    accumulation: Annotated[int, Option(min=1, help="micro-batches per step, to save memory")] = 1,
    max_tokens: Annotated[int, Option(min=4, help="texts are cut here")] = 128,
    pairs: Annotated[str | None, Option(help="read pairs of texts together or apart; default by model")] = None,
    train_rows: Annotated[int | None, Option(min=1, help="use only so many training rows, drawn by the seed")] = None,
    validate_every: Annotated[int, Option(min=0, help="steps; the best validated step is kept; 0 is off")] = 50,
    patience: Annotated[int, Option(min=1, help="validations without a better one before it stops")] = 10,
    checkpoint_every: Annotated[int, Option(min=0, help="steps; 0 is off")] = 100,
    mixed_precision: Annotated[str, Option(help="no or bf16")] = "no",
    tracker: Annotated[list[str], Option(help="tensorboard, wandb, ... as accelerate names them; may be repeated")] = [],  # noqa: B006
    seed: Annotated[int, Option(help="of every draw")] = 0,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Fine-tune a transformers model on labelled texts, or a diffusion model on images, with any adapter of the house or its
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
    check_choice("--pairs", pairs, ("together", "apart", None))
    tuning = parse_tuning(adapter, dict(map(setting, set_)))
    config = SupervisedConfig(
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        validate_every=validate_every,
        patience=patience,
        checkpoint_every=checkpoint_every,
        mixed_precision=mixed_precision,  # type: ignore[arg-type]
        trackers=tuple(tracker),
        seed=seed,
    )
    rows: dict[str, Any] = {"train_rows": train_rows, "seed": seed}
    if task == "diffusion":
        if len(text) > 1:
            raise UserError(f"--text must be the one column of captions, got {', '.join(text)}. Give it once.")
        check_choice("--score of diffusion", score or "loss", ("loss",))
        captioned = CaptionTask(name=task, kind="diffusion", score=score, image=picture, caption=(*text, "text")[0])
        found = read_captions(captioned, data, held_out, **rows)
        subject: TaskModel = DiffusionTaskModel(resolve_model(model, device=device, dtype="float32"))  # type: ignore[arg-type]
    else:
        chosen, place = _text_task(task, data, text, target, score)
        found = read_data(chosen, place, held_out, **rows)
        subject = load_text_model(
            model,
            Target.of(found),
            pairs=pairs,  # type: ignore[arg-type]
            max_tokens=max_tokens,
            seed=seed,
            device=device,
        )
    result = finetune(subject, found, folder, tuning, config, targets=tuple(targets), label=f"{tuning.name} on {task}")
    out.print_json(data=asdict(result))


def _text_task(name: str, data: Path, texts: list[str], target: str, score: str) -> tuple[Any, Path]:
    """A named task and its folder, or one of the user's own columns."""
    from valign.data.tasks.texts import GLUE, TextTask, named_task

    if name not in GLUE:
        columns: dict[str, Any] = {"texts": tuple(texts) or ("text",), "target": "" if name == "causal-lm" else target}
        return TextTask(name=name, kind=name, score=score, **columns), data  # type: ignore[arg-type]
    if texts:
        raise UserError(f"--text must not be given for {name}, which names its columns itself. Use --task classification.")
    return named_task(name, data)
