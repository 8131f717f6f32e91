"""``valign audit``: how brittle is a model's safety, before it is released? One command per audit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text
from typer import Context, Option, Typer

from valign.checks import UserError, option
from valign.cli.common import AsJson, TableOptions, err, one_of, print_measured, resolve_detector, resolve_model, values_by_name
from valign.cli.early import TUNINGS, refuse_subject
from valign.cli.judges import AnswerJudgeOptions
from valign.cli.options import configured, record, rest_of
from valign.files import read_json

if TYPE_CHECKING:
    from valign.audits.concentration import AuditSubject

Folder = Annotated[Path, Option("--out", "-o", help="new folder for audit.json, curves.png and the verdict")]

app = Typer(no_args_is_help=True, help="How brittle a model's safety is, before it is released.")


@app.callback()
def audit() -> None:
    """How brittle a model's safety is, before it is released."""


@app.command(
    cls=configured(
        rest_from=("adapters", "optimizers", "objectives/preserving"),
        checks=dict.fromkeys(("--model", "-m"), refuse_subject),
        named={"--adapter": TUNINGS, "-a": TUNINGS, "--preserve": ("valign.objectives:PRESERVING",)},
        rest="the adapter's own and the objectives', such as dropout=0.05 or agl.lambda_A=1",
        grid="valign.audits.fragility:FragilityGrid",
        asked="valign.cli.fragility:FragilityOptions",
        table=TableOptions,
        judging=AnswerJudgeOptions,
    ),
    epilog="example: valign audit fragility -m FOLDER -d chats.jsonl -s requests.jsonl --max-minutes 120 -o runs/fragility   "
    "a diffusion model: valign audit fragility -m PIPELINE -d images -s prompts.csv --detector nudenet -o runs/fragility",
)
def fragility(
    ctx: Context,
    model: Annotated[str, Option("--model", "-m", help="folder of a chat model or a pipeline; chat, shapes")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of numbers and report; an unfinished sweep is resumed")],
    data: Annotated[str, Option("--data", "-d", help="benign chats, or images with captions, as valign finetune takes them")] = "",
    suite: Annotated[str, Option("--suite", "-s", help="held-out requests with labels; a world's own for its models")] = "",
    adapter: Annotated[str, Option("--adapter", "-a", help="ADAPTER[+OPTIMIZER][+PERTURBATION]")] = "lora",
    preserve: Annotated[str, Option(help="objectives that keep safety, joined by +: the audit of a defence")] = "",
    calibration: Annotated[Path | None, Option(help="rows that the objectives read, as valign finetune takes them")] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on harmless data at 12 settings or more, and report what its safety becomes. No weights are left."""
    from valign.audits.fragility import FragilityGrid
    from valign.audits.sweep import SweepPlan
    from valign.cli.fragility import chat_sweep, image_sweep
    from valign.recipes.subjects import find_subjects
    from valign.training.engine.tuning import parse_tuning
    from valign.training.tasks.preserving import parse_preserving

    subject, _ = find_subjects(model, model)
    if subject.adapter is not None:
        raise UserError(f"--model must be a whole model, got {model}. Merge an adapter first, with valign adapter fuse.")
    objectives, rest = parse_preserving(preserve, rest_of(ctx))
    if calibration is not None and not objectives:
        raise UserError("--calibration must go with --preserve, whose objectives read it. Name one, or leave it out.")
    plan = SweepPlan(grid=record(ctx, FragilityGrid), tuning=parse_tuning(adapter, rest), preserve=objectives, name=model)
    run = chat_sweep if subject.kind == "chat" else image_sweep
    found = run(ctx, subject, data, suite, calibration, plan, folder, device)
    worst = found["worst"]
    if worst is not None:
        value, low, high = (100 * worst["drop"][key] for key in ("value", "low", "high"))
        what = "of risky requests refused" if subject.kind == "chat" else "of risky prompts drawn without harm"
        before = f"{100 * found['start']['refused']:.1f} % {what} before"
        err.print(Text(f"{before}; at worst {value:.1f} points fewer [{low:.1f}, {high:.1f}]", style="bold"))
    print_measured(found, str(folder / "report.html"), as_json=as_json)


@app.command(
    "subspaces",
    epilog="examples: valign audit subspaces --base base --aligned aligned --update benign=tuned --update unsafe=drifted "
    "--useful benign --harmful unsafe -o audit   "
    "experts of a diffusion model, against each other: valign audit subspaces --update hate=runs/hate "
    "--update violence=runs/violence -o audit   a text encoder: valign audit subspaces --base base/text_encoder "
    "--aligned aligned/text_encoder --update tuned=tuned/text_encoder -o audit",
)
def subspaces(
    update: Annotated[list[str], Option(metavar="NAME=FOLDER", help="model or adapter fine-tuned from the aligned one; repeat it")],
    folder: Folder,
    base: Annotated[str, Option(help="model before its safety training")] = "",
    aligned: Annotated[Path | None, Option(help="model after it, or an adapter; without both, updates are compared alone")] = None,
    start: Annotated[
        str, Option(help="what the updates started from: aligned or base", callback=one_of("--start", "aligned", "base"))
    ] = "aligned",
    useful: Annotated[list[str], Option(help="name of an update on benign data, for the verdict")] = [],  # noqa: B006
    harmful: Annotated[list[str], Option(help="name of an update on unsafe data, for the verdict")] = [],  # noqa: B006
    side: Annotated[
        str, Option(help="directions of a weight's outputs (left) or inputs (right)", callback=one_of("--side", "left", "right"))
    ] = "left",
    as_json: AsJson = False,
) -> None:
    """Do harmful updates share more directions with the alignment than useful ones? Overlaps, projections and random controls."""
    from valign.audits.report import write_audit
    from valign.audits.subspaces import audit_subspaces
    from valign.merging.realign import AdapterChanges, open_realignment
    from valign.models.files.adapter_files import open_adapter

    _free(folder)
    places = values_by_name("--update", update)
    if bool(base) != (aligned is not None):
        raise UserError("--base and --aligned must be given together, got one of them. Leave both out to compare updates alone.")
    if aligned is None:
        updates: dict[str, Any] = {name: AdapterChanges(open_adapter(place, anywhere=True)) for name, place in places.items()}
        alignment = None
    else:
        opened = open_realignment(base, aligned, list(places.values()), start=start)  # type: ignore[arg-type]
        updates = dict(zip(places, opened.vectors.tasks.values(), strict=True))
        alignment = opened.vectors.safety
    figures, plots, verdict = audit_subspaces(
        updates,
        alignment,
        useful=useful,
        harmful=harmful,
        side=side,  # type: ignore[arg-type]
    )
    write_audit(folder, figures, plots, verdict)
    _print_audit(folder, verdict, as_json)


DRAWING: Mapping[str, tuple[object, ...]] = {"part": ("unet", "text-encoder")}  # parts that are asked for images
NETWORKS: Mapping[str, tuple[object, ...]] = {"part": ("chat", "unet", "text-encoder")}


@dataclass(frozen=True, kw_only=True)
class SubjectOptions:
    """What is audited, and what it is asked."""

    part: str = option("chat", help="what the model is", choices=("chat", "checker", "unet", "text-encoder"))
    adapter: Path | None = option(None, help="adapter on top of it; of a chat model, or of a diffusion model", needs=NETWORKS)
    anyway: bool = option(
        False, help="also load an adapter whose record names another base model", needs={"adapter": (), **NETWORKS}
    )
    prompts: Path | None = option(
        None,
        help="prompts with labels (1: should be refused), halved for probe and measurement",
        needs={**NETWORKS, "world": ("",)},
    )
    world: str = option(
        "",
        help="take requests and exact judge of a world: chat, for its chat models",
        choices=("", "chat"),
        needs={"part": ("chat",)},
    )
    rows: int = option(200, help="requests of each of the four sets, of a world", low=4, needs={"world": ()})
    flagged_images: Path | None = option(None, help="folder of images that a checker should flag", needs={"part": ("checker",)})
    benign_images: Path | None = option(None, help="folder of images that it should pass", needs={"part": ("checker",)})
    detector: tuple[str, ...] = option(("oracle",), help="what judges a diffusion model's images", needs=DRAWING)
    steps: int = option(12, help="denoising steps of a diffusion model's image", low=1, needs=DRAWING)
    device: str = option("auto", help="auto, cpu, cuda, ...", needs=NETWORKS)


@app.command(
    "concentration",
    cls=configured(
        checks=dict.fromkeys(("--model", "-m"), refuse_subject),
        audit="valign.audits.concentration:Concentration",
        subject=SubjectOptions,
    ),
    epilog="examples: valign audit concentration --model FOLDER --prompts prompts.csv -o audit   "
    "the chat world: valign audit concentration --model FOLDER --world chat -o audit   "
    "a safety checker: valign audit concentration --model PIPELINE --part checker --flagged-images bad "
    "--benign-images good -o audit   "
    "a diffusion model: valign audit concentration --model shapes --part unet --adapter runs/expert --prompts prompts.csv -o audit",
)
def concentration(
    ctx: Context,
    model: Annotated[str, Option("--model", "-m", help="folder of a chat model, or of a pipeline; of a world's model its name")],
    folder: Folder,
    as_json: AsJson = False,
) -> None:
    """How few neurons carry the refusals? Tagged and random ones fall silent for a while; no pruned weight is written."""
    from valign.audits.concentration import Concentration, audit_concentration
    from valign.audits.report import write_audit
    from valign.audits.subjects import row_key

    options, asked = record(ctx, Concentration), record(ctx, SubjectOptions)
    _free(folder)
    subject, sets, utility = _subject(model, asked, options.seed)
    flagged, benign, held_flagged, held_benign = sets
    figures, plots, verdict = audit_concentration(
        subject, flagged, benign, held_flagged, held_benign, options, utility=utility, key=row_key
    )
    write_audit(folder, figures, plots, verdict)
    _print_audit(folder, verdict, as_json)


def _print_audit(folder: Path, verdict: Sequence[str], as_json: bool) -> None:
    """The verdict, or all figures as `write_audit` left them."""
    file = folder / "audit.json"
    print_measured(read_json(file) if as_json else None, "\n".join([*verdict, f"All figures: {file}"]), as_json=as_json)


def _free(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder} exists. Choose another --out, or delete it first.")


def _subject(model: str, asked: SubjectOptions, seed: int) -> "tuple[AuditSubject, tuple[Any, ...], Any]":
    """The subject, its four sets of rows, and what measures utility."""
    if asked.part == "chat":
        return _chat(model, asked, seed)
    if asked.part == "checker":
        from valign.audits.subjects import CheckerSubject
        from valign.detectors.safety_checker import SafetyCheckerDetector
        from valign.images import image_files, open_image

        if asked.flagged_images is None or asked.benign_images is None:
            raise UserError(
                "A checker is audited on --flagged-images and --benign-images, got one or none of them. Name both folders."
            )
        detector = SafetyCheckerDetector(model)
        folders = (asked.flagged_images, asked.benign_images)
        flagged, benign = ([open_image(path) for path in image_files(folder)] for folder in folders)
        return CheckerSubject(detector, detector.model.vision_model), _halves(flagged, benign, seed), None
    from valign.audits.subjects import DiffusionSubject
    from valign.interfaces import SamplingConfig
    from valign.models.diffusion.lora import load_adapter

    detector_ = resolve_detector(list(asked.detector), model=model)
    loaded = resolve_model(model, device=asked.device, dtype="float32")
    if asked.adapter is not None:
        load_adapter(loaded, asked.adapter, name="audited", anyway=asked.anyway)
    sampling = SamplingConfig(steps=asked.steps)
    subject = DiffusionSubject(loaded, detector_, part=asked.part, sampling=sampling)  # type: ignore[arg-type]
    return subject, _halves(*_prompts(asked), seed), None


def _chat(model: str, asked: SubjectOptions, seed: int) -> "tuple[AuditSubject, tuple[Any, ...], Any]":
    from valign.audits.subjects import ChatSubject
    from valign.models.language.loading import load_chat
    from valign.text.refusals import reads_as_refusal

    chat = load_chat(model, adapter=asked.adapter, device=asked.device, anyway=asked.anyway)
    if asked.world:
        from valign.worlds.chat.grammar import ChatGrammar
        from valign.worlds.chat.measure import ask, share
        from valign.worlds.chat.oracle import ChatOracle

        grammar, oracle = ChatGrammar(), ChatOracle()
        unsafe, safe = (grammar.requests(kind, 2 * asked.rows, seed) for kind in ("disallowed", "allowed"))  # type: ignore[arg-type]
        skills = grammar.requests("skill", min(asked.rows, 60), seed)

        def judge(rows: Any, answers: Any) -> list[bool]:
            return [oracle.judge(row, answer).state == "refused" for row, answer in zip(rows, answers, strict=True)]

        subject = ChatSubject(chat, judge, messages=lambda row: row.messages)
        sets = (unsafe[: asked.rows], safe[: asked.rows], unsafe[asked.rows :], safe[asked.rows :])
        return subject, sets, lambda: share(ask(chat, skills), "right").rate
    flagged, benign = ([[{"role": "user", "content": text}] for text in texts] for texts in _prompts(asked))
    return ChatSubject(chat, lambda _, answers: [reads_as_refusal(one) for one in answers]), _halves(flagged, benign, seed), None


def _prompts(asked: SubjectOptions) -> tuple[list[str], list[str]]:
    from valign.data.prompts.readers import read_prompts

    if asked.prompts is None:
        raise UserError("The audit needs --prompts FILE with labels, or for the chat world --world chat.")
    rows = {row.prompt: row.label for row in read_prompts(str(asked.prompts))}
    return [text for text, label in rows.items() if label], [
        text for text, label in rows.items() if label is not None and not label
    ]


def _halves(flagged: list[Any], benign: list[Any], seed: int) -> tuple[Any, ...]:
    """Probe and held-out rows of both sorts, split by the seed."""
    import torch

    from valign.randomness import generator_for

    found = []
    for name, rows in (("flagged", flagged), ("benign", benign)):
        order = torch.randperm(len(rows), generator=generator_for("halves", seed, name)).tolist()
        found.append([[rows[place] for place in order[start::2]] for start in (0, 1)])
    return found[0][0], found[1][0], found[0][1], found[1][1]
