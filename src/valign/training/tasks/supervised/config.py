"""Every number of a fine-tuning on labelled texts."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from valign.checks import check_options, option
from valign.training.engine.schedule import Schedule

# They change where, how fast or how visibly a training runs, not what it computes (beyond rounding): a run may resume with others.
EXECUTION = ("accumulation", "eval_batch", "checkpoint_every", "keep_checkpoints", "trackers")


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """The budget is ``steps`` of ``batch_size`` rows; the learning rate of the adapter is the method's own."""

    steps: int = option(300, help="optimizer steps at most", low=1)
    batch_size: int = option(16, help="rows per step, over all micro-batches", low=1)
    accumulation: int = option(1, help="micro-batches per step, to save memory", low=1)
    head_learning_rate: float = option(5e-3, help="learning rate of the head beside the adapter, AdamW", above=0, rare=True)
    warmup: float = option(0.06, help="share of the steps in which the learning rate rises from 0", low=0, high=1, rare=True)
    schedule: Literal["linear", "constant"] = option(
        "linear", help="of the learning rate after the warm-up: down to 0, or constant", rare=True
    )
    max_grad_norm: float = option(1.0, help="cap on the norm of all gradients together; 0 is off", low=0, rare=True)
    seed: int = option(0, help="random seed of the order of rows, of dropout, of the adapter and of the head")
    mixed_precision: Literal["no", "bf16"] = option("no", help="autocast of the forward passes")
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
    trackers: tuple[str, ...] = option(
        (), help="tensorboard, wandb, ... as accelerate names them; metrics.jsonl is always written", flags=("--tracker",)
    )

    def __post_init__(self) -> None:
        check_options(self)

    def recipe(self) -> dict[str, Any]:
        """The options that shape the result; a run resumes only if they are unchanged."""
        return {name: value for name, value in asdict(self).items() if name not in EXECUTION}

    def shares(self) -> Schedule:
        """Of the learning rates as shares of their peaks, in (0, 1]: the first step after the warm-up is the first at the peak."""
        rising = round(self.warmup * self.steps)
        decay: Literal["linear", "none"] = "linear" if self.schedule == "linear" else "none"
        return Schedule(steps=self.steps, warmup=rising, reached=rising + 1, decay=decay)
