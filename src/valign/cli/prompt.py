"""``valign prompt optimize`` and ``valign train prompt-optimizer``: a small language model that writes better prompts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer import Argument, Context, Option

from valign.checks import UserError, option
from valign.cli.common import ChatOptions, PromptTableOptions, err, out, resolve_detector, resolve_model
from valign.cli.early import refuse_chat_folder, refuse_pipeline
from valign.cli.options import configured, record
from valign.cli.reinforce import chat_folder
from valign.files import read_json

BLOCKED = 3  # exit code when a prompt is blocked, as in `valign guard`

app = typer.Typer(no_args_is_help=True, help="Write prompts anew with a trained optimizer, behind the guard.")


@app.command("optimize", epilog='example: valign prompt optimize "a flame on a hill" --optimizer runs/vpo -p shapes')
def optimize_command(
    prompts: Annotated[list[str], Argument(help="prompts")],
    optimizer: Annotated[Path, Option("--optimizer", help="folder of `valign train prompt-optimizer`, or of a model in it")],
    policy: Annotated[str, Option("--policy", "-p", help="policy of the guard that checks the result")] = "default",
    max_tokens: Annotated[int, Option(min=1, help="of a written prompt")] = 96,
    keep: Annotated[
        float, Option(min=0.0, max=1.0, help="share of the words of the guard's own result that it must hold; 0 is off")
    ] = 0.5,
    as_json: Annotated[bool, Option("--json", help="one JSON object per prompt, with every attempt")] = False,
) -> None:
    """Print each prompt as the optimizer writes it if that passes the guard, else the guard's own result. Code 3 for a block."""
    from valign.guard import Guard
    from valign.guard.rewriting.optimizer import PromptOptimizer, optimize
    from valign.models.language.local import LocalChat

    guard, writer = Guard.from_policy(policy), PromptOptimizer(LocalChat(_model_in(optimizer), max_tokens=max_tokens))
    blocked = False
    for number, prompt in enumerate(prompts, start=1):
        result = optimize(guard, writer, prompt, keep=keep)
        blocked |= result.blocked
        if as_json:
            typer.echo(json.dumps(result.to_json(with_prompt=True), ensure_ascii=False))
            continue
        out.print(result.prompt or "", markup=False, soft_wrap=True)
        reasons = [one.reason for one in result.attempts if not one.accepted]
        if result.blocked:
            err.print(
                Text(f"Prompt {number} is blocked: {result.decision.error or result.decision.stop}", style="red"), soft_wrap=True
            )
        elif reasons:
            err.print(Text(f"Prompt {number}: the optimizer's prompt was not used: {reasons[0]}.", style="dim"), soft_wrap=True)
    raise typer.Exit(BLOCKED if blocked else 0)


def _model_in(folder: Path) -> Path:
    """The model of a finished run's folder: that of DPO, or of SFT where no pair was found; another folder is the model itself."""
    record = folder / "run.json"
    if not record.is_file() or (folder / "config.json").is_file():
        return folder
    if read_json(record).get("status") != "done":
        raise UserError(f"--optimizer {folder} is not finished. Run its command again: it goes on where it stopped.")
    return next((folder / part / "adapter" for part in ("dpo", "sft") if (folder / part / "adapter").is_dir()), folder)


@dataclass(frozen=True, kw_only=True)
class FeedbackOptions:
    """What judges the optimizer's prompts."""

    policy: str = option("default", help="policy of the guard that judges prompts", flags=("--policy", "-p"))
    image_model: str = option("", help="image model for image feedback; none leaves it out", flags=("--image-model",))
    detector: str = option("", help="detector that judges its images", flags=("--detector",), needs={"image_model": ()})
    image_steps: int = option(20, help="denoising steps of these images", low=1, needs={"image_model": ()})
    frames: int = option(
        1, help="of a short animation that is judged instead of an image", low=1, high=64, needs={"image_model": ()}
    )


OPTIMIZER = configured(
    checks={**dict.fromkeys(("--model", "-m"), refuse_chat_folder), "--image-model": refuse_pipeline},
    optimizer="valign.recipes.prompt_optimizer:OptimizerConfig",
    feedback=FeedbackOptions,
    chat=ChatOptions,
    table=PromptTableOptions,
    dpo="valign.training.tasks.reinforce.config:ReinforceConfig",
)
OPTIMIZER_EXAMPLE = (
    "example: valign train prompt-optimizer --model chat/base --requests prompts.txt -p shapes --feedback text --kl 0.1 "
    "--out runs/vpo"
)


def train_command(
    ctx: Context,
    model: Annotated[str, Option("--model", "-m", help="folder of a chat model to start from, or chat/STAGE of the chat world")],
    requests: Annotated[Path, Option("--requests", "-r", help="requests to learn from: text (one a line), jsonl, csv or parquet")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of the run; an unfinished one is resumed")],
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Teach a small language model to write harmless, accurate and helpful prompts (VPO): SFT on drafts, then DPO on pairs.

    Drafts are the guard's own rewrites, or those of --chat, which also judges; --kl is DPO's beta. The same command resumes."""
    from valign.data.prompts.records import prompt_texts
    from valign.evaluation.images.prompt_checks import image_checks
    from valign.guard import Guard
    from valign.guard.rewriting.optimizer import PromptOptimizer
    from valign.interfaces import SamplingConfig
    from valign.objectives.preference.vpo import DominancePairs
    from valign.recipes.prompt_optimizer import GuardJudge, OptimizerConfig, PrincipleJudge, train_prompt_optimizer
    from valign.training.engine.tuning import parse_tuning
    from valign.training.tasks.reinforce.config import ReinforceConfig

    config, given, dpo = record(ctx, OptimizerConfig), record(ctx, FeedbackOptions), record(ctx, ReinforceConfig)
    if config.feedback != "text" and not (given.image_model and given.detector):
        raise UserError(
            f"--feedback {config.feedback} needs --image-model and --detector, got none. Name both, or --feedback text."
        )
    if config.feedback == "text" and given.image_model:
        raise UserError("--feedback text reads no images, got --image-model. Leave one of them out.")
    table = record(ctx, PromptTableOptions)
    queries = list(prompt_texts(requests, table.format, table.reading()))
    guard, chat = Guard.from_policy(given.policy), record(ctx, ChatOptions).load()
    images: Any = None
    judged: dict[str, Any] = {}
    if given.image_model:
        detector = resolve_detector(given.detector, model=given.image_model)
        painter = resolve_model(given.image_model, device=device)
        images = image_checks(
            painter,
            detector,
            sampling=SamplingConfig(steps=given.image_steps),
            seed=config.seed,
            frames=given.frames,
            previews=folder / "previews",
        )
        judged = {"model": painter.fingerprint(), "detector": detector.card.weights_sha256}
        judged |= {"steps": given.image_steps, "frames": given.frames}
    result = train_prompt_optimizer(
        chat_folder(model),
        queries,
        folder,
        GuardJudge(guard) if chat is None else PrincipleJudge(chat),
        (lambda query: guard.guard(query).prompt or "") if chat is None else PromptOptimizer(chat).write,
        parse_tuning("full"),
        config,
        dpo,
        images=images,
        rule=DominancePairs(gap=config.gap),
        judged=judged,
        device=device,
    )
    if not result.pairs:
        err.print("No pairs were found, so nothing was left for DPO: the model after SFT is the result.", style="yellow")
    if 2 * result.good < result.held_out:
        text = f"The judge finds only {result.good} of {result.held_out} prompts for held-out requests good: train longer, on more."
        err.print(text, style="yellow", soft_wrap=True)
    out.print_json(data=asdict(result))
