"""Every number of a reinforcement that does not belong to its method."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from valign.checks import check_options, option
from valign.training.engine.schedule import Schedule

EXECUTION = ("accumulation", "batch_size", "checkpoint_every", "keep_checkpoints", "trackers")  # change no result beyond rounding


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig:
    """``steps`` steps, each with ``group`` answers to each of ``prompts`` prompts."""

    steps: int = option(200, help="optimizer steps", low=1)
    prompts: int = option(8, help="prompts (or pairs) per step", low=1, flags=("--prompts-per-step",))
    group: int = option(8, help="answers per prompt, which are compared with each other", low=2, hint="One answer has no rival.")
    learning_rate: float = option(1e-6, help="of the policy", above=0)
    warmup: float = option(0.0, help="share of the steps in which the learning rate rises from 0", low=0, high=1, rare=True)
    kl: float = option(1e-3, help="weight of the divergence from the model as it was", low=0)
    clip: float = option(0.2, help="of the probability ratio, on either side of 1", above=0, rare=True)
    loss: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = option("grpo", help="how trl takes the mean over tokens", rare=True)
    temperature: float = option(1.0, help="of sampling the answers", above=0, rare=True)
    answer_tokens: int = option(256, help="length of an answer, at most", low=1)
    accumulation: int = option(1, help="micro-batches per step, to save memory", low=1, rare=True)
    batch_size: int = option(128, help="answers generated or scored at once", low=1, rare=True)
    max_grad_norm: float = option(1.0, help="cap on the norm of the policy's gradients; 0 is off", low=0, rare=True)
    seed: int = option(0, help="random seed of the order of prompts, the answers and the adapter")
    checkpoint_every: int = option(25, help="steps between checkpoints; 0 is off: a killed run starts again", low=0)
    keep_checkpoints: int = option(1, help="latest checkpoints kept", low=1, rare=True, needs={"checkpoint_every": ()})
    trackers: tuple[str, ...] = option((), help="tensorboard, wandb, ... as accelerate names them", flags=("--tracker",), rare=True)

    def __post_init__(self) -> None:
        check_options(self)
        if (self.prompts * self.group) % self.accumulation:
            raise ValueError(
                f"ReinforceConfig.accumulation must divide the {self.prompts * self.group} answers of a step, got "
                f"{self.accumulation}. Take a power of two."
            )

    def recipe(self) -> dict[str, Any]:
        """The options that shape the result; a run resumes only if they are unchanged."""
        return {name: value for name, value in asdict(self).items() if name not in EXECUTION}

    def shares(self) -> Schedule:
        """Of the learning rates as shares of their peaks."""
        rising = round(self.warmup * self.steps)
        return Schedule(steps=self.steps, warmup=rising, reached=rising + 1)
