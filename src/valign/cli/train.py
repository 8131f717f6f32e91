"""``valign train``: train adapters on preference data."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Option, Typer

from valign.checks import UserError, check_choice
from valign.cli.common import err, out, resolve_model, setting

if TYPE_CHECKING:
    from valign.models.diffusion.base import DiffusionModel
    from valign.recipes.alignguard import AlignGuardRecipe
    from valign.training import TrainResult

app = Typer(no_args_is_help=True, help="Train LoRA experts or a value encoder on pairs; an interrupted run resumes by itself.")


@app.command(
    epilog="example: valign train alignguard --model shapes --data runs/data --category violence --out runs/violence   "
    "all categories: valign train alignguard --model shapes --data runs/data --all --out runs/experts   "
    "several processes: accelerate launch --num_processes 2 -m valign train alignguard ..."
)
def alignguard(
    model: Annotated[str, Option("--model", "-m", help="the model to align: shapes, a pipeline folder or a hub id")],
    data: Annotated[Path, Option("--data", "-d", help="data set of `valign data build`, made with the same model")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of the run; with --all, one folder per category in it")],
    category: Annotated[str, Option(help="train the expert of this category")] = "",
    all_: Annotated[bool, Option("--all", help="train one expert for each category that has data")] = False,
    joint: Annotated[bool, Option("--joint", help="train one adapter on all pairs (a baseline)")] = False,
    preset: Annotated[str, Option(help="auto (by the model's family and size), stable-diffusion, sdxl or shapes")] = "auto",
    steps: Annotated[int | None, Option(min=1, help="optimizer steps at most; validation may stop earlier")] = None,
    learning_rate: Annotated[float | None, Option(help="learning rate")] = None,
    beta: Annotated[float | None, Option(help="strength of the preference, 1 / mean squared error")] = None,
    adapter: Annotated[str | None, Option(help="lora, ailora, comp-lora, lora-sb, sora, codyra, increlora or diffora")] = None,
    rank: Annotated[int | None, Option(min=1, help="LoRA rank")] = None,
    pairs_per_step: Annotated[int | None, Option(min=1, help="pairs per step, over all processes")] = None,
    accumulation: Annotated[int | None, Option(min=1, help="micro-batches per step and process, to save memory")] = None,
    sft_weight: Annotated[float | None, Option(min=0, help="weight of the winner's own error; holds it down")] = None,
    winner_safeguard: Annotated[
        float | None, Option(min=0, max=1, help="scale the loser's gradient (Diffusion-SDPO); 0.9 there")
    ] = None,
    retain_weight: Annotated[
        float | None, Option(min=0, help="hold the model to itself on the data's benign prompts, this firmly")
    ] = None,
    flip: Annotated[
        bool | None, Option("--flip/--no-flip", help="mirror pairs half of the time; off where left and right matter")
    ] = None,
    split_pairs: Annotated[bool | None, Option("--split-pairs", help="half the memory, a third more time, the same result")] = None,
    gradient_checkpointing: Annotated[bool | None, Option("--gradient-checkpointing", help="less memory, more time")] = None,
    sample_every: Annotated[int | None, Option(min=0, help="steps between image grids of four training prompts; 0 is off")] = None,
    checkpoint_every: Annotated[int | None, Option(min=1, help="steps between checkpoints")] = None,
    tracker: Annotated[list[str], Option(help="tensorboard, wandb, ... as accelerate names them; may be repeated")] = [],  # noqa: B006
    set_: Annotated[
        list[str], Option("--set", metavar="NAME=VALUE", help="any other option of the recipe, e.g. val_fraction=0.2")
    ] = [],  # noqa: B006
    seed: Annotated[int | None, Option(help="of the order of pairs and of every draw")] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Train AlignGuard's safety experts: one LoRA per harm category, by Diffusion-DPO. The same command resumes."""
    from valign.data.images.latents import open_latents
    from valign.policy import normalize_category
    from valign.recipes.alignguard import JOINT, train_expert, train_experts
    from valign.training.engine.processes import local_device

    if bool(category) + all_ + joint != 1:
        raise UserError("train alignguard needs one of --category NAME, --all or --joint. Choose one.")
    subject = resolve_model(model, device=local_device(device))
    cache = open_latents(data, base=subject.fingerprint())
    changes: dict[str, Any] = {
        "steps": steps,
        "learning_rate": learning_rate,
        "beta": beta,
        "adapter": adapter,
        "rank": rank,
        "pairs_per_step": pairs_per_step,
        "accumulation": accumulation,
        "sft_weight": sft_weight,
        "winner_safeguard": winner_safeguard,
        "retain_weight": retain_weight,
        "flip": flip,
        "split_pairs": split_pairs,
        "gradient_checkpointing": gradient_checkpointing,
        "sample_every": sample_every,
        "checkpoint_every": checkpoint_every,
        "trackers": tuple(tracker) or None,
        "seed": seed,
        **dict(map(setting, set_)),
    }
    recipe = _preset(preset, subject).changed(**changes)
    chosen = normalize_category(category) if category else None
    if recipe.training.sample_every and not recipe.training.sample_prompts:
        recipe = recipe.changed(sample_prompts=_prompts(data, chosen))
    if all_:
        results = train_experts(subject, cache, folder, recipe)
    else:
        results = {chosen or JOINT: train_expert(subject, cache, chosen, folder, recipe)}
    _print(results)


@app.command(
    epilog="example: valign train livo --model shapes --data runs/values --out runs/livo   "
    "to compare: valign train livo --model shapes --data runs/values --objective diffusion-dpo --out runs/livo-dpo"
)
def livo(
    model: Annotated[str, Option("--model", "-m", help="the model to guide: shapes, a pipeline folder or a hub id")],
    data: Annotated[Path, Option("--data", "-d", help="data set of `valign data build-values`, made with the same model")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of the run; the value encoder is OUT/values")],
    objective: Annotated[str, Option(help="livo, or diffusion-dpo on the same value encoder")] = "livo",
    layout: Annotated[
        str | None, Option(help="reference (prompt cut to 76 tokens, unpadded) or padded (77 and the token), for drawing")
    ] = None,
    lora_rank: Annotated[int | None, Option(min=1, help="train factors of this rank instead of the whole encoder")] = None,
    steps: Annotated[int | None, Option(min=1, help="optimizer steps at most; validation may stop earlier")] = None,
    learning_rate: Annotated[float | None, Option(help="learning rate")] = None,
    pairs_per_step: Annotated[int | None, Option(min=1, help="pairs per step, over all processes")] = None,
    accumulation: Annotated[int | None, Option(min=1, help="micro-batches per step and process, to save memory")] = None,
    min_snr: Annotated[float | None, Option(help="cap of the signal-to-noise weight on all errors; 5 in the paper")] = None,
    flip: Annotated[
        bool | None, Option("--flip/--no-flip", help="mirror pairs half of the time; off where left and right matter")
    ] = None,
    split_pairs: Annotated[bool | None, Option("--split-pairs", help="half the memory, a third more time, the same result")] = None,
    gradient_checkpointing: Annotated[bool | None, Option("--gradient-checkpointing", help="less memory, more time")] = None,
    sample_every: Annotated[
        int | None, Option(min=0, help="steps between grids of four scenes without and with the token; 0 is off")
    ] = None,
    checkpoint_every: Annotated[int | None, Option(min=1, help="steps between checkpoints")] = None,
    tracker: Annotated[list[str], Option(help="tensorboard, wandb, ... as accelerate names them; may be repeated")] = [],  # noqa: B006
    set_: Annotated[
        list[str], Option("--set", metavar="NAME=VALUE", help="any other option of the recipe, e.g. beta=500 or alpha=250")
    ] = [],  # noqa: B006
    seed: Annotated[int | None, Option(help="of the order of pairs and of every draw")] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Train LiVO's value encoder: one token beside a frozen model, for all principles of the data. The same command resumes."""
    from valign.data.images.value_sets import open_values
    from valign.recipes.livo import LivoRecipe, train_livo
    from valign.training.engine.processes import local_device

    subject = resolve_model(model, device=local_device(device))
    cache = open_values(data, base=subject.fingerprint())
    recipe = LivoRecipe.for_model(subject).with_objective(objective)
    changes: dict[str, Any] = {
        "layout": layout,
        "lora_rank": lora_rank,
        "steps": steps,
        "learning_rate": learning_rate,
        "pairs_per_step": pairs_per_step,
        "accumulation": accumulation,
        "min_snr": min_snr,
        "flip": flip,
        "split_pairs": split_pairs,
        "gradient_checkpointing": gradient_checkpointing,
        "sample_every": sample_every,
        "checkpoint_every": checkpoint_every,
        "trackers": tuple(tracker) or None,
        "seed": seed,
        **dict(map(setting, set_)),
    }
    recipe = recipe.changed(**changes)
    if recipe.training.sample_every and not recipe.training.sample_prompts:
        recipe = recipe.changed(sample_prompts=tuple(dict.fromkeys(cache.prompts))[:4])
    _print({"livo": train_livo(subject, cache, folder, recipe)})


def _preset(name: str, model: "DiffusionModel") -> "AlignGuardRecipe":
    from valign.recipes.alignguard import AlignGuardRecipe

    makers = {
        "auto": lambda: AlignGuardRecipe.for_model(model),
        "stable-diffusion": AlignGuardRecipe,
        "sdxl": AlignGuardRecipe.sdxl,
        "shapes": AlignGuardRecipe.shapes,
    }
    check_choice("--preset", name, makers)
    return makers[name]()


def _prompts(data: Path, category: str | None) -> tuple[str, ...]:
    """The first four unsafe prompts of the category."""
    from valign.data.prompts.pairs import load_pairs

    pairs = load_pairs(data / "prompts" / "pairs.parquet")
    return tuple(pair.unsafe for pair in pairs if category is None or category in pair.categories)[:4]


def _print(results: "dict[str, TrainResult]") -> None:
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    table = Table("expert", "best step", "of", "stopped by", "val. loss", "drift", box=None, header_style="bold")
    for name, result in results.items():
        numbers = [f"{result.metrics[key]:.3g}" if key in result.metrics else "-" for key in ("val_loss", "drift")]
        table.add_row(name, str(result.best_step), str(result.steps), result.stopped or "-", *numbers)
    err.print(table)
    for result in results.values():
        out.print(str(result.adapter), markup=False, soft_wrap=True)
