"""Every number of a fine-tuning on labelled texts."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from valign.checks import check_choice, check_range
from valign.training.engine.schedule import Schedule

# They change where, how fast or how visibly a training runs, not what it computes (beyond rounding): a run may resume with others.
EXECUTION = ("accumulation", "eval_batch", "checkpoint_every", "keep_checkpoints", "trackers")


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """The budget is ``steps`` of ``batch_size`` rows; the learning rate of the adapter is the method's own."""

    steps: int = 300
    batch_size: int = 16  # rows per step, over all micro-batches
    accumulation: int = 1  # micro-batches a step is cut into, to save memory
    head_learning_rate: float = 5e-3  # of the head beside the adapter, AdamW
    warmup: float = 0.06  # share of the steps in which the rate rises from 0
    schedule: Literal["linear", "constant"] = "linear"  # after that: down to 0, or as it is
    max_grad_norm: float = 1.0  # of all gradients together; 0 is off
    seed: int = 0  # of the order of rows, of dropout, of the adapter and of the head
    mixed_precision: Literal["no", "bf16"] = "no"  # autocast of the forward passes
    validate_every: int = 50  # steps; 0 is off: the last step is kept
    patience: int = 10  # validations without an improvement before the training stops
    eval_batch: int = 64  # rows of a forward pass without gradients
    checkpoint_every: int = 100  # steps; 0 is off: a killed run starts again
    keep_checkpoints: int = 1  # latest ones, besides the best
    trackers: tuple[str, ...] = ()  # names that accelerate knows; metrics.jsonl is always written

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "patience", "eval_batch", "keep_checkpoints"):
            check_range(f"SupervisedConfig.{name}", float(getattr(self, name)), low=1.0)
        for name in ("max_grad_norm", "validate_every", "checkpoint_every"):
            check_range(f"SupervisedConfig.{name}", float(getattr(self, name)), low=0.0)
        check_range("SupervisedConfig.head_learning_rate", self.head_learning_rate, above=0.0)
        check_range("SupervisedConfig.warmup", self.warmup, low=0.0, high=1.0)
        check_choice("SupervisedConfig.schedule", self.schedule, ("linear", "constant"))
        check_choice("SupervisedConfig.mixed_precision", self.mixed_precision, ("no", "bf16"))

    def recipe(self) -> dict[str, Any]:
        """The options that shape the result; a run resumes only if they are unchanged."""
        return {name: value for name, value in asdict(self).items() if name not in EXECUTION}

    def shares(self) -> Schedule:
        """Of the learning rates as shares of their peaks, in (0, 1]: the first step after the warm-up is the first at the peak."""
        rising = round(self.warmup * self.steps)
        decay: Literal["linear", "none"] = "linear" if self.schedule == "linear" else "none"
        return Schedule(steps=self.steps, warmup=rising, reached=rising + 1, decay=decay)
