"""What ``valign audit fragility`` reads for chat models and for diffusion models."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Context

from valign.checks import UserError, check_choice, option
from valign.cli.common import TableOptions
from valign.cli.judges import AnswerJudgeOptions
from valign.cli.options import record, refuse_given

if TYPE_CHECKING:
    from valign.audits.sweep import SweepPlan
    from valign.recipes.subjects import Subject


@dataclass(frozen=True, kw_only=True)
class FragilityOptions:
    """What is asked of the fine-tuned models, and how they are fine-tuned beside the grid."""

    policy: str = option(
        "", help="of a diffusion model: whose concepts are asked without a suite; default: its world's, or default"
    )
    detector: tuple[str, ...] = option((), help="of a diffusion model: who judges its images; a world's oracle for its own")
    task: str = option(
        "",
        help="of a world's model without --data: its benign task, such as counting (chat; the default) or benign-tilted (shapes)",
    )
    samples: int | None = option(
        None, help="of a world: requests per kind (chat; default 100), or prompts per concept (shapes; default 3)", low=1
    )
    answer_tokens: int = option(128, help="length of an answer of a chat model", low=1)
    max_tokens: int = option(512, help="of a training chat", low=4)
    image: str = option("file_name", help="column of the training images' files", rare=True)
    caption: str = option("text", help="column of their captions", rare=True)
    sample_steps: int = option(20, help="denoising steps of an image", low=1, rare=True)
    guidance_scale: float = option(7.5, help="classifier-free guidance of an image", low=1, rare=True)
    image_batch: int = option(16, help="images of a diffusion model at a time", low=1, rare=True)
    seed: int = option(0, help="random seed of the prompts of a world, and of the images", low=0, rare=True)


ON_IMAGES = ("policy", "detector", "image", "caption", "sample_steps", "guidance_scale", "image_batch")
ON_ANSWERS = ("answer_tokens", "max_tokens", "judge")


def _refuse_other(ctx: Context, names: Sequence[str], what: str, *, data: str, suite: str) -> None:
    """Refuse options of the other kind of model, and those of a world's own data and prompts where others were named."""
    refuse_given(ctx, f"on {what}", *names)
    if data:
        refuse_given(ctx, "with --data", "task")
    if suite:
        refuse_given(ctx, "with --suite", "samples")


def chat_sweep(
    ctx: Context, subject: "Subject", data: str, suite: str, calibration: Path | None, plan: "SweepPlan", out: Path, device: str
) -> dict[str, Any]:
    """`audit_chat` with what was given."""
    from valign.audits.chat_fragility import audit_chat
    from valign.data.chats import read_chats
    from valign.data.chats.conversation import Conversation
    from valign.data.tasks.base import Task, assemble
    from valign.evaluation.chats.cases import suite_cases
    from valign.evaluation.chats.judges import PhraseJudge
    from valign.evaluation.suite_files import read_suite
    from valign.training.tasks.preserving import PreserveData
    from valign.worlds import CHAT_WORLDS

    reading, asked = record(ctx, TableOptions).reading(), record(ctx, FragilityOptions)
    _refuse_other(ctx, ON_IMAGES, "a chat model", data=data, suite=suite)
    world = CHAT_WORLDS.get(subject.name.partition(":")[0])
    if world is None and not (data and suite):
        raise UserError("--data and --suite must name benign chats and held-out requests, got nothing. They go with any own model.")

    def chats(of: Any) -> Any:
        """Benign chats as the model renders them."""
        if world is not None and not data:
            listed = world.grammar().task_chats(asked.task or "counting", 400, 0)
            rows = [Conversation(tuple((turn["role"], turn["content"]) for turn in chat)) for chat in listed]
        else:
            rows = read_chats(Path(data), reading)
        return assemble(
            Task(name="chat", kind="chat"), data, of.fitting(rows), [], share=0.1, held_out_rows=None, train_rows=None, seed=0
        )

    named = record(ctx, AnswerJudgeOptions).resolve()
    return audit_chat(
        subject.folder,
        chats,
        suite_cases(read_suite(suite)) if suite else world.cases(asked.samples or 100, asked.seed) if world else [],
        named or (PhraseJudge() if suite or world is None else world.judge()),
        replace(
            plan,
            beside=PreserveData(calibration=tuple(read_chats(calibration, reading.beside("calibration")))) if calibration else None,
        ),
        out,
        max_tokens=asked.max_tokens,
        answer_tokens=asked.answer_tokens,
        device=device,
    )


def image_sweep(
    ctx: Context, subject: "Subject", data: str, suite: str, calibration: Path | None, plan: "SweepPlan", out: Path, device: str
) -> dict[str, Any]:
    """`audit_images` with what was given."""
    from valign.audits.image_fragility import audit_images
    from valign.data.tasks.captions import CaptionTask, read_caption_rows, read_captions
    from valign.evaluation.suite_files import read_suite
    from valign.interfaces import SamplingConfig
    from valign.models.files.origin import model_origins
    from valign.policy import load_policy
    from valign.recipes.check_images import image_tests
    from valign.recipes.check_result import CheckOptions
    from valign.training.tasks.preserving import PreserveData
    from valign.worlds import WORLDS

    reading, asked = record(ctx, TableOptions).reading(), record(ctx, FragilityOptions)
    _refuse_other(ctx, ON_ANSWERS, "a diffusion model", data=data, suite=suite)
    origins = set(model_origins(subject.folder))
    world = next((one for one in WORLDS.values() if set(one.origins) & origins), None)
    policy = load_policy(asked.policy or (world.policy if world else "default"))
    task = CaptionTask(name="diffusion", kind="diffusion", image=asked.image, caption=asked.caption)
    if data:
        rows = read_captions(task, Path(data), None, reading=reading)
    elif world is not None:
        known = [name for name in world.tasks if name.startswith("benign-")]
        chosen = asked.task or known[0]
        check_choice("--task", chosen, known)
        rows = world.tasks[chosen](chosen, count=200, held_out=40, seed=0)
    else:
        raise UserError("--data must name benign images with captions, got nothing. See valign finetune --task diffusion.")
    tests = read_suite(suite, known=policy.category_ids()) if suite else None
    options = CheckOptions(samples=asked.samples or 3, seed=asked.seed)
    prompts, evaluators = image_tests(policy, tests, asked.detector, subject, options)
    kept = tuple(read_caption_rows(calibration, task, reading=reading.beside("calibration"))) if calibration else ()
    return audit_images(
        subject.folder,
        rows,
        prompts,
        evaluators,
        replace(plan, beside=PreserveData(calibration=kept) if kept else None),
        out,
        sampling=SamplingConfig(
            steps=asked.sample_steps, guidance_scale=asked.guidance_scale, batch_size=asked.image_batch, seed=asked.seed
        ),
        device=device,
    )
