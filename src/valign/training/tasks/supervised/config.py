"""Every number of a fine-tuning on labelled texts."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from valign.checks import UserError, check_options, option
from valign.memory import AUTOCAST, PAIRS, MemoryConfig
from valign.training.engine.schedule import Schedule

# They change where, how fast or how visibly a training runs, not what it computes (beyond rounding): a run may resume with others.
EXECUTION = (
    "memory",
    "eval_batch",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_every",
    "sample_prompts",
    "sample_steps",
    "trackers",
)


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """The budget is ``steps`` of ``batch_size`` rows; the learning rate of the adapter is the method's own."""

    steps: int = option(300, help="optimizer steps at most", low=1)
    batch_size: int = option(16, help="rows per step, over all micro-batches", low=1)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    head_learning_rate: float = option(5e-3, help="learning rate of the head beside the adapter, AdamW", above=0, rare=True)
    warmup: float = option(0.06, help="share of the steps in which the learning rate rises from 0", low=0, high=1, rare=True)
    schedule: Literal["linear", "cosine", "constant"] = option(
        "linear", help="of the learning rate after the warm-up: down to 0 in a line or half a cosine, or constant", rare=True
    )
    max_grad_norm: float = option(1.0, help="cap on the norm of all gradients together; 0 is off", low=0, rare=True)
    seed: int = option(0, help="random seed of the order of rows, of dropout, of the adapter and of the head")
    validate_every: int = option(
        50, help="steps between validations; the best validated step is kept; 0 is off: the last step is kept", low=0
    )
    patience: int = option(
        10, help="validations without an improvement before the training stops", low=1, needs={"validate_every": ()}
    )
    eval_batch: int = option(64, help="rows of a forward pass without gradients", low=1, rare=True)
    checkpoint_every: int = option(100, help="steps between checkpoints; 0 is off: a killed run starts again", low=0)
    keep_checkpoints: int = option(
        1, help="latest checkpoints kept, besides the best", low=1, rare=True, needs={"checkpoint_every": ()}
    )
    sample_every: int = option(
        0, help="steps between image grids at fixed prompts and seeds, of a diffusion model; 0 is off", low=0
    )
    sample_prompts: tuple[str, ...] = option(
        (), help="prompt of the image grids; four captions of the data if left out", rare=True, needs={"sample_every": ()}
    )
    sample_steps: int = option(20, help="denoising steps of a sample", low=1, rare=True, needs={"sample_every": ()})
    trackers: tuple[str, ...] = option(
        (), help="tensorboard, wandb, ... as accelerate names them; metrics.jsonl is always written", flags=("--tracker",)
    )

    def __post_init__(self) -> None:
        check_options(self)
        self.memory.refuse_unused(PAIRS, why="where single rows are trained on")
        if self.memory.precision == "float16":
            raise UserError("memory.precision of a fine-tuning must be float32 or bfloat16, got float16. Use bfloat16.")

    def recipe(self) -> dict[str, Any]:
        """The options that shape the result; a run resumes only if they are unchanged."""
        found = {name: value for name, value in asdict(self).items() if name not in EXECUTION}
        return found | {"mixed_precision": AUTOCAST[self.memory.precision]}

    def shares(self) -> Schedule:
        """Of the learning rates as shares of their peaks, in (0, 1]: the first step after the warm-up is the first at the peak."""
        rising = round(self.warmup * self.steps)
        decay: Literal["linear", "cosine", "none"] = "none" if self.schedule == "constant" else self.schedule
        return Schedule(steps=self.steps, warmup=rising, reached=rising + 1, decay=decay)
