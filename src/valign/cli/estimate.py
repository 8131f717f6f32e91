"""``valign estimate``: memory, disk and time of every phase of a command, before it starts and from configurations alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from typer import Context, Exit, Option

from valign.checks import UserError, option
from valign.cli.common import example, one_of
from valign.cli.fitting import diffusion_folder, diffusion_run, print_estimate, timed, weights_on_disk
from valign.cli.options import changes, configured, record
from valign.memory import COMMON, LATENTS, PAIRS, TRAINING, MemoryConfig

if TYPE_CHECKING:
    from valign.recipes.estimate import PlannedRun
    from valign.recipes.footprints import DiffusionPhases, Phase

COMMANDS = ("align", "train", "finetune", "evaluate", "serve")


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much of everything the command works on."""

    categories: int = option(7, help="categories that get an expert", low=1)
    pairs: int = option(100, help="pairs per category", low=1)
    test_prompts: int = option(200, help="prompts of the test suite", low=1)
    systems: int = option(2, help="models that evaluate compares: the base and its adapters", low=1)
    rank: int = option(8, help="rank of a fine-tuned LoRA; training experts has its own, train.rank", low=1)
    full: bool = option(False, help="a chat model's weights are all trained, instead of a LoRA")
    max_tokens: int = option(512, help="of a chat", low=4)


@example(
    "valign estimate --model sdxl --command align --memory-limit 24   "
    "a chat model: valign estimate --model FOLDER --command finetune --task chat",
    cls=configured(
        pipeline=True,
        models=("sd15", "sd21", "sdxl"),
        amounts=Amounts,
        train="valign.training.tasks.preference.config:PreferenceConfig",
        sampling="valign.interfaces:SamplingConfig",
        finetuning="valign.training.tasks.supervised.config:SupervisedConfig",
        memory="valign.memory:MemoryConfig",
        typed={
            "amounts": ("categories", "pairs", "test_prompts", "rank", "full", "max_tokens"),
            "train": ("pairs_per_step",),
            "sampling": ("batch_size",),
            "finetuning": (),
            "memory": COMMON,
        },
    ),
)
def command(
    ctx: Context,
    model: Annotated[
        str,
        Option("--model", "-m", help="shapes, a folder with configurations (weights may be missing), sd15, sd21 or sdxl"),
    ],
    for_: Annotated[str, Option("--command", help=", ".join(COMMANDS), callback=one_of("--command", *COMMANDS))] = "align",
    task: Annotated[
        str, Option("--task", help="of finetune: diffusion or chat", callback=one_of("--task", "diffusion", "chat"))
    ] = "diffusion",
    device: Annotated[str, Option(help="auto, cpu, cuda, ...; a card elsewhere needs --memory-limit")] = "auto",
    as_json: Annotated[bool, Option("--json", help="as JSON")] = False,
) -> None:
    """Say what a command needs before it starts: peak memory, disk and time of every phase. Exit code 1 if it does not fit."""
    if task == "chat" and for_ != "finetune":
        raise UserError(f"--task chat is a task of finetune, got --command {for_}. Add --command finetune.")
    memory = record(ctx, MemoryConfig)
    if for_ in ("evaluate", "serve"):
        memory.refuse_unused(TRAINING, PAIRS, why=f"on {for_}, which trains nothing")
    from valign.recipes.estimate import plan, planned_device, this_machine

    machine = this_machine(planned_device(device, memory), memory)
    with TemporaryDirectory() as temporary:
        if task == "chat":
            memory.refuse_unused(LATENTS, PAIRS, why="on a chat model, which is one network")
            run = _chat(ctx, Path(model).expanduser())
        else:
            run = _diffusion(ctx, _folder(model, Path(temporary)), memory, for_, device)
        found = timed(run, plan(run, memory, machine), device, memory)
    print_estimate(found, as_json=as_json)
    raise Exit(0 if found.fits else 1)


def _folder(model: str, temporary: Path) -> Path:
    """Where the model's configurations are; those of a published size are written first."""
    from valign.models.diffusion.published import PUBLISHED, write_configs

    if model in PUBLISHED:
        return write_configs(model, temporary / model)
    folder = diffusion_folder(model)
    if folder is None:
        raise UserError(
            f"{model} must be a folder with model_index.json and configurations, {', '.join(PUBLISHED)}, or a hub model in the "
            "cache, got nothing there. Check the path."
        )
    return folder


def _diffusion(ctx: Context, folder: Path, memory: MemoryConfig, command: str, device: str) -> PlannedRun:
    from valign.adapters import default_targets
    from valign.interfaces import SamplingConfig
    from valign.models.diffusion.loading import read_family
    from valign.recipes.align import AlignConfig
    from valign.recipes.alignguard import AlignGuardRecipe
    from valign.recipes.tuning import searched
    from valign.training import PreferenceConfig
    from valign.training.tasks.supervised import SupervisedConfig

    read_family(folder)
    amounts, sampling, finetuning = record(ctx, Amounts), record(ctx, SamplingConfig), record(ctx, SupervisedConfig)
    trained = changes(ctx, PreferenceConfig)

    def make(phases: DiffusionPhases, batch: int | None = None) -> Iterable[Phase]:
        sampled = replace(sampling, batch_size=batch or sampling.batch_size)
        shared: dict[str, Any] = {"batch_size": sampled.batch_size, "steps": sampled.steps}
        preset = AlignGuardRecipe.for_model(phases.sketch.shapes, **trained)
        experts = preset.changed(**phases.memory.chosen())
        if command == "align":
            chain = AlignConfig(experts=experts, **shared)
            chain = replace(chain, data=replace(chain.data, pairs_per_category=amounts.pairs, **shared))
            tried = searched(chain.grid)
            yield from phases.align(chain, categories=amounts.categories, prompts=amounts.test_prompts, candidates=tried)
        elif command == "train":
            yield phases.training(experts.training, amounts.categories)
        elif command == "finetune":
            yield from phases.encoding(amounts.pairs, amounts.pairs, 1, 1)
            tuned = replace(finetuning, memory=phases.memory)
            yield phases.finetuning(
                tuned,
                amounts.rank,
                default_targets(phases.sketch.shapes.denoiser),
                "adamw-eight-bit" if memory.eight_bit else "adamw",
            )
        else:
            yield phases.sampling(
                "generate images", (amounts.systems if command == "evaluate" else 1) * amounts.test_prompts, sampled
            )

    preset_rows = trained.get("pairs_per_step", PreferenceConfig.pairs_per_step)
    rows = {"align": preset_rows, "train": preset_rows, "finetune": finetuning.batch_size}.get(command)
    smaller = {} if command in ("train", "finetune") else {f"--batch-size {n}": (lambda p, n=n: make(p, n)) for n in (4, 1)}
    return diffusion_run(folder, memory, device, make, rows=rows, pairs=command in ("align", "train"), smaller=smaller)


def _chat(ctx: Context, folder: Path) -> PlannedRun:
    from valign.recipes.estimate import PlannedRun
    from valign.recipes.footprints import chat_finetuning
    from valign.training.tasks.supervised import SupervisedConfig

    amounts, config = record(ctx, Amounts), record(ctx, SupervisedConfig)
    rank = None if amounts.full else amounts.rank

    def phases(memory: MemoryConfig) -> list[Phase]:
        return [chat_finetuning(folder, replace(config, memory=memory), tokens=amounts.max_tokens, rank=rank)]

    return PlannedRun(phases=phases, rows=config.batch_size, networks=False, weights=lambda: weights_on_disk(folder))
