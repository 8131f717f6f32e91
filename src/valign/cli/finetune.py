"""``valign finetune``: one model, one task, one method."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Context, Option

from valign.checks import UserError, check_choice, option
from valign.cli.common import TableOptions, example, out, resolve_model
from valign.cli.early import TUNINGS, refuse_chat_folder, refuse_encoder, refuse_pipeline
from valign.cli.fitting import EstimateOnly, diffusion_folder, diffusion_run, fit, weights_on_disk
from valign.cli.options import configured, record, refuse_given, rest_of
from valign.memory import LATENTS, MemoryConfig

READ_BY_NONE = {  # by kind of task: columns and options that it does not read
    "chat": ("text", "target", "image", "pairs", "skip_unreadable", "buckets"),
    "diffusion": ("target", "pairs", "max_tokens"),
    "causal-lm": ("target", "image", "skip_unreadable", "buckets"),
    "text": ("image", "skip_unreadable", "buckets"),
}
OF_CHATS = ("guard", "guard_noise", "overlong", "previews")
TASKS = ("valign.data.tasks.texts:GLUE", "valign.data.tasks.base:SCORES")

if TYPE_CHECKING:
    from valign.recipes.footprints import DiffusionPhases, Phase
    from valign.training.engine.tuning import Tuning
    from valign.training.tasks.supervised import SupervisedConfig


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
    text_encoder: bool = option(False, help="of a diffusion model: a LoRA on its text encoders, too")
    convolutions: bool = option(False, help="of a diffusion model: a LoRA on the U-Net's convolutions, too")
    train_rows: int | None = option(None, help="use only so many training rows, chosen by the seed", low=1)


@dataclass(frozen=True, kw_only=True)
class SafetyOptions:
    """What keeps a model's safety while it is fine-tuned, or removes what it should not know."""

    preserve: str = option("", help="objectives, joined by +: agl, kl, constrained-sft, star-dss, safety-recovery, ihl, npo, ...")
    calibration: Path | None = option(
        None, help="like --data: what is to stay, such as risky requests with refusals; of chats also pairs (chosen, rejected)"
    )
    forget: Path | None = option(None, help="like --data: what is to be unlearned, for ihl, npo and ascent")
    guard: str = option("", help="what scores answers for star-dss: chat, the chat world's exact guard", choices=("", "chat"))
    guard_noise: float = option(
        0.0, help="standard deviation of an error on the guard's scores", low=0, rare=True, needs={"guard": ()}
    )
    rows_per_step: int | None = option(
        None, help="calibration or forget rows per step; default: as many as training rows", low=1, rare=True
    )
    refusal: tuple[str, ...] = option(
        (), help="further words with which a refusal in --calibration begins", needs={"calibration": ()}
    )
    overlong: str = option("refuse", help="chats above --max-tokens", choices=("refuse", "drop"), rare=True)
    previews: int = option(4, help="held-out chats whose answers before and after are kept in answers.json", low=0, rare=True)


@example(
    "valign finetune --model minilm --task sst2 --data glue --adapter ailora --set rank=4 --out runs/sst2   "
    "own data: valign finetune --model FOLDER --task classification --data train.csv --text review --target stars "
    "--adapter lora --out runs/stars   "
    "a language model: valign finetune --model FOLDER --task causal-lm --data pairs.jsonl --text ask --text answer --adapter pissa "
    "--out runs/lm   "
    "a chat model that keeps its refusals: valign finetune --model FOLDER --task chat --data chats.jsonl --adapter lora "
    "--preserve agl --calibration refusals.jsonl --out runs/chat   "
    "a diffusion model: valign finetune --model shapes --task diffusion --data images --adapter lora --text-encoder --convolutions "
    "--out runs/style",
    cls=configured(
        rest_from=("adapters", "optimizers", "objectives/preserving"),
        early=lambda params, _: _refuse_model(params["task"], params["model"]),
        named={"--adapter": TUNINGS, "-a": TUNINGS, "--task": TASKS, "-t": TASKS, "--preserve": ("valign.objectives:PRESERVING",)},
        rest="the adapter's own and the objectives', such as rank=4, learning_rate=1.0e-3 or agl.lambda_A=1",
        columns=ColumnOptions,
        table=TableOptions,
        preserving=SafetyOptions,
        training="valign.training.tasks.supervised.config:SupervisedConfig",
        memory="valign.memory:MemoryConfig",
    ),
)
def command(
    ctx: Context,
    model: Annotated[
        str,
        Option("--model", "-m", help="minilm, shapes, or a folder or hub id: of a transformers model, or a pipeline"),
    ],
    task: Annotated[
        str, Option("--task", "-t", help="cola, sst2, mrpc, rte, stsb, classification, regression, causal-lm, chat or diffusion")
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
    four_bit: Annotated[
        bool, Option("--four-bit", help="of a chat model: frozen weights in 4 bits a number (QLoRA); needs bitsandbytes")
    ] = False,
    estimate: EstimateOnly = False,
) -> None:
    """Fine-tune a transformers model on labelled texts or chats, or a diffusion model on images, with any adapter of the package or
    its baselines, and with objectives that keep its safety. The same command resumes."""
    from dataclasses import asdict, replace
    from functools import partial

    from accelerate import PartialState

    from valign.data.tasks.base import SCORES
    from valign.data.tasks.captions import CaptionTask, read_caption_rows, read_captions
    from valign.data.tasks.texts import GLUE, read_data, read_rows
    from valign.models.heads.task_model import Target, TaskModel
    from valign.models.language.text_model import load_text_model
    from valign.trackers import check_trackers
    from valign.training.engine.processes import local_device
    from valign.training.engine.tuning import parse_tuning
    from valign.training.tasks.preserving import parse_preserving
    from valign.training.tasks.supervised import DiffusionTaskModel, SupervisedConfig, finetune

    check_choice("--task", task, (*GLUE, *SCORES))
    device = local_device(device)
    columns, config = record(ctx, ColumnOptions), record(ctx, SupervisedConfig, memory=record(ctx, MemoryConfig))
    check_trackers(config.trackers)
    preserving = record(ctx, SafetyOptions)
    preserve, rest = parse_preserving(preserving.preserve, rest_of(ctx))
    tuning = parse_tuning(adapter, rest)
    tuning = tuning.eight_bit() if config.memory.eight_bit else tuning
    refuse_given(ctx, f"on the task {task}", *READ_BY_NONE.get(task, READ_BY_NONE["text"]), *(OF_CHATS if task != "chat" else ()))
    if task in GLUE:
        refuse_given(ctx, f"on the task {task}, which names its columns itself", "target")
    if "star-dss" not in preserving.preserve.split("+"):
        refuse_given(ctx, "without --preserve star-dss", "guard")
    if task != "diffusion":
        config.memory.refuse_unused(LATENTS, why=f"on {task}, whose model is one network")
        for name in ("text_encoder", "convolutions"):
            if getattr(columns, name):
                raise UserError(f"--{name.replace('_', '-')} is of diffusion models, got the task {task}. Leave it out.")
    if four_bit:
        _check_four_bit(task, tuning, estimate)
    if columns.text_encoder:
        config.memory.refuse_unused(("phased", "offload"), why="with --text-encoder, which trains networks that it would send away")
    half = config.memory.precision == "bfloat16" and tuning.adapter.frozen_base
    dtype = "bfloat16" if half else "float32"  # what trains, or is split into factors, stays in float32
    reading = record(ctx, TableOptions).reading()
    rows: dict[str, Any] = {"train_rows": columns.train_rows, "seed": config.seed, "reading": reading}
    fitted = partial(_fitted, model, task, columns, config, tuning, tuple(targets), device, folder, estimate, four_bit)
    if task == "diffusion":
        if len(columns.text) > 1:
            raise UserError(f"--text must be the one column of captions, got {', '.join(columns.text)}. Give it once.")
        check_choice("--score of diffusion", columns.score or "loss", ("loss",))
        captioned = CaptionTask(
            name=task, kind="diffusion", score=columns.score, image=columns.image, caption=(*columns.text, "text")[0]
        )
        found = read_captions(captioned, data, columns.held_out, skip_unreadable=columns.skip_unreadable, **rows)
        config = replace(config, memory=fitted(images=len(found.train) + len(found.held_out)))
        subject: TaskModel = DiffusionTaskModel(
            resolve_model(model, device=device, dtype=dtype, memory=config.memory),  # type: ignore[arg-type]
            buckets=columns.buckets,
            text_encoder=columns.text_encoder,
            convolutions=columns.convolutions,
        )
        read: Any = lambda path: read_caption_rows(  # noqa: E731
            path, captioned, reading=reading, skip_unreadable=columns.skip_unreadable
        )
    elif task == "chat":
        config = replace(config, memory=fitted())
        subject, found, read = _chats(model, data, columns, preserving, rows, device, dtype, four_bit)
    else:
        config = replace(config, memory=fitted())
        chosen, place = _text_task(task, data, columns)
        found = read_data(chosen, place, columns.held_out, **rows)
        subject = load_text_model(
            model,
            Target.of(found),
            pairs=columns.pairs,  # type: ignore[arg-type]
            max_tokens=columns.max_tokens,
            seed=config.seed,
            device=device,
            dtype=dtype,
        )
        read = lambda path: read_rows(path, chosen, reading)  # noqa: E731
    result = finetune(
        subject,
        found,
        folder,
        tuning,
        config,
        targets=tuple(targets),
        preserve=preserve,
        beside=_beside(task, preserving, read, reading),
        previews=preserving.previews,
        label=f"{tuning.name} on {task}",
    )
    if PartialState().is_main_process:
        out.print_json(data=asdict(result))


def _refuse_model(task: str, name: str) -> None:
    """Refuse what is not a model of the task's kind."""
    check = {"diffusion": refuse_pipeline, "chat": refuse_chat_folder}.get(task, refuse_encoder)
    check("--model", name)


def _check_four_bit(task: str, tuning: "Tuning", estimate: bool) -> None:
    """Refuse what cannot be done with weights in 4 bits, before anything is loaded; an estimate needs no bitsandbytes."""
    from valign.models.language.loading import check_four_bit

    if task != "chat":
        raise UserError(f"--four-bit is of chat models, got the task {task}. Leave it out.")
    if not tuning.adapter.frozen_base:
        raise UserError(f"--four-bit must go with an adapter that leaves the weights as they are, got {tuning.name}. Use lora.")
    if not estimate:
        check_four_bit()


def _fitted(
    model: str,
    task: str,
    columns: ColumnOptions,
    config: "SupervisedConfig",
    tuning: "Tuning",
    targets: tuple[str, ...],
    device: str,
    out: Path,
    only: bool,
    four_bit: bool,
    *,
    images: int = 0,
) -> MemoryConfig:
    """The memory options of the run, chosen by what is free; those that were given for tasks that nobody can estimate.

    Args: images: With captions, which are encoded once.
    """
    from dataclasses import replace

    from valign.adapters import default_targets
    from valign.adapters.full import FullOptions
    from valign.models.diffusion.lora import CONVOLUTIONS
    from valign.recipes.estimate import PlannedRun
    from valign.recipes.footprints import chat_finetuning

    memory, method = config.memory, tuning.adapter
    rank = None if isinstance(method, FullOptions) else getattr(method, "rank", 8)
    optimizer = "adamw-eight-bit" if memory.eight_bit else "adamw"
    place = diffusion_folder(model) if task == "diffusion" else Path(model).expanduser()

    def chat(chosen: MemoryConfig) -> "list[Phase]":
        planned = replace(config, memory=chosen)
        assert place is not None
        return [chat_finetuning(place, planned, tokens=columns.max_tokens, rank=rank, targets=targets, four_bit=four_bit)]

    def diffusion(known: "DiffusionPhases") -> "list[Phase]":
        wanted = default_targets(known.sketch.shapes.denoiser, targets) + (CONVOLUTIONS if columns.convolutions else ())
        planned = replace(config, memory=known.memory)
        tuned = known.finetuning(planned, rank or 8, wanted, optimizer, text_encoder=columns.text_encoder)
        return [*known.encoding(images, images, 1, 1), tuned]

    if task == "diffusion":
        plan = lambda: diffusion_run(  # noqa: E731
            place, memory, device, diffusion, rows=config.batch_size, networks=not columns.text_encoder
        )
    elif task == "chat":
        read = lambda: weights_on_disk(Path(model).expanduser())  # noqa: E731
        plan = lambda: PlannedRun(phases=chat, rows=config.batch_size, networks=False, weights=read)  # noqa: E731
    elif only:
        raise UserError(f"--estimate is for the tasks diffusion and chat, got {task}. Leave it out.")
    else:
        return memory
    return fit(plan, place, memory, device, out, only=only)


def _chats(
    model: str,
    data: Path,
    columns: ColumnOptions,
    preserving: SafetyOptions,
    rows: dict[str, Any],
    device: str,
    dtype: str,
    four_bit: bool,
) -> tuple[Any, Any, Any]:
    """A chat model, its data, and how another file of chats is read for it: only what fits, so that mistakes are found first."""
    from valign.data.chats import read_chats
    from valign.data.tasks.base import Task, assemble
    from valign.models.language.chat_task import ChatTaskModel
    from valign.models.language.loading import load_chat

    subject = ChatTaskModel(
        load_chat(model, device=device, dtype=dtype, four_bit=four_bit), max_tokens=columns.max_tokens, overlong=preserving.overlong
    )

    def read(path: Path) -> Any:
        return subject.fitting(read_chats(path, reading), f"{path}, row")

    reading, counts = rows["reading"], {name: rows[name] for name in ("train_rows", "seed")}
    others = read(columns.held_out) if columns.held_out else []
    task = Task(name="chat", kind="chat", score=columns.score)
    return subject, assemble(task, data, read(data), others, share=0.1, held_out_rows=None, **counts), read


def _beside(task: str, given: SafetyOptions, read: Any, reading: Any) -> Any:
    """The rows that the objectives read."""
    from valign.data.chats import is_pair_file, read_chat_pairs
    from valign.training.tasks.preserving import PreserveData

    pairs: Any = ()
    if given.calibration is not None and task == "chat" and is_pair_file(given.calibration, reading):
        pairs = tuple(read_chat_pairs(given.calibration, reading))
    calibration = read(given.calibration) if given.calibration and not pairs else ()
    return PreserveData(
        calibration=tuple(calibration),
        pairs=pairs,
        forget=tuple(read(given.forget)) if given.forget else (),
        guard=_guard(given),
        guard_name=f"{given.guard}, noise {given.guard_noise:g}" if given.guard else "",
        rows_per_step=given.rows_per_step,
        refusals=given.refusal,
    )


def _guard(given: SafetyOptions) -> Any:
    if not given.guard:
        return None
    from valign.worlds.chat.guard import ChatGuard

    return ChatGuard(noise=given.guard_noise)


def _text_task(name: str, data: Path, columns: ColumnOptions) -> tuple[Any, Path]:
    """A named task and its folder, or one of the user's own columns."""
    from valign.data.tasks.texts import GLUE, TextTask, named_task

    if name not in GLUE:
        target = "" if name == "causal-lm" else columns.target
        return TextTask(name=name, kind=name, score=columns.score, texts=columns.text or ("text",), target=target), data  # type: ignore[arg-type]
    if columns.text:
        raise UserError(f"--text must not be given for {name}, which names its columns itself. Use --task classification.")
    return named_task(name, data)
