"""Every number of a preference training, with its unit and where the default comes from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from valign.adapters.registry import ADAPTERS, EXPERTS
from valign.checks import UserError, check_options, option, with_options
from valign.memory import MemoryConfig
from valign.optimizers.registry import OPTIMIZERS
from valign.training.engine.schedule import Schedule

# They change where, how fast or how visibly a training runs, not what it computes (beyond rounding): a run may resume with others.
EXECUTION = (
    "memory",
    "compile",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_every",
    "sample_prompts",
    "sample_steps",
    "trackers",
)
# Names in records that were written before the fields had their names of today.
RECORDED = {f"displacement_{name}": f"alarm_{name}" for name in ("warn", "stop", "window")}


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """One LoRA trained on pairs (caption, winner, loser). Defaults: Stable Diffusion 1.5 as in AlignGuard (arXiv 2412.10493)."""

    # adapter
    adapter: str = option("lora", help="how the LoRA starts, and what of it trains", choices=EXPERTS)
    rank: int = option(4, help="LoRA rank", low=1)
    alpha: float | None = option(None, help="LoRA scale is alpha / rank; rank if left out, so scale 1", above=0, rare=True)
    targets: tuple[str, ...] = option(
        ("to_q", "to_k", "to_v", "to_out.0"),
        help="ending of the linear layers to adapt; by default those of every attention, self and cross",
        rare=True,
    )
    init_seed: int = option(0, help="random seed of the A factors; experts that will be merged share it", rare=True)
    # optimizer
    optimizer: Literal["adamw", "adafactor"] = option(
        "adamw", help="adafactor has a fixed rate, no momentum and its own clipping; the authors' choice on SDXL", rare=True
    )
    learning_rate: float = option(
        1.6e-4, help="learning rate per step; 1e-5 times 16 pairs, as `scale_lr` does on one GPU", above=0
    )
    weight_decay: float = option(0.01, help="weight decay of the optimizer", low=0, rare=True)
    warmup_steps: int = option(200, help="steps in which the learning rate rises linearly from 0", low=0, rare=True)
    decay: Literal["none", "cosine"] = option(
        "none", help="after the warm-up: constant, or half a cosine that ends at 0", rare=True
    )
    max_grad_norm: float = option(
        1.0,
        help="cap on the gradient's norm over all factors; 0 is off. Not used with adafactor",
        low=0,
        rare=True,
        needs={"optimizer": ("adamw",)},
    )
    # amount
    steps: int = option(2000, help="optimizer steps at most; validation may stop earlier", low=1)
    pairs_per_step: int = option(16, help="pairs per step, over all processes and micro-batches", low=1)
    seed: int = option(0, help="random seed of the order of pairs and of the noise")
    # loss
    empty_prompt_prob: float = option(
        0.1,
        help="probability of an empty caption, which trains guidance's unconditional branch too; 0.2 in the authors' runs",
        low=0,
        high=1,
        rare=True,
    )
    flip: bool = option(True, help="mirror both images of a pair half of the time; off where left and right matter")
    sft_weight: float = option(0.0, help="weight of the winner's own mean squared error in the loss; holds it down", low=0)
    winner_safeguard: float | None = option(
        None, help="scale the loser's gradient (Diffusion-SDPO); 0.9 in the authors' launcher", low=0, high=1
    )
    min_snr: float | None = option(None, help="cap of the signal-to-noise weight on all errors; 5 in the paper", above=0)
    safe_prompt_term: bool = option(False, help="add the same loss under the safe prompt's caption, weight 1", rare=True)
    retain_weight: float = option(
        0.0, help="weight of the squared move away from the base model under benign captions; holds the model to itself", low=0
    )
    precompute_ref_draws: int = option(
        0,
        help="fixed random draws per pair with reference errors computed once; pays off from as many epochs on. 0 is off",
        low=0,
        rare=True,
    )
    # memory and time
    memory: MemoryConfig = field(default_factory=MemoryConfig)  # forward passes have the precision of the model's weights
    compile: bool = option(
        False, help="compile the network with torch.compile: pays off in long trainings; needs a compiler (g++, Triton)", rare=True
    )
    # validation on held-out pairs
    val_fraction: float = option(
        0.1, help="share of the pairs held out for validation, chosen by hash of their id; 0 is off", low=0, high=0.5, rare=True
    )
    val_pairs: int = option(32, help="held-out pairs at most", low=1, rare=True, needs={"val_fraction": ()})
    val_draws: int = option(
        4,
        help="fixed timesteps per held-out pair, one from each quarter of the schedule",
        low=1,
        rare=True,
        needs={"val_fraction": ()},
    )
    validate_every: int = option(50, help="steps between validations", low=1, rare=True, needs={"val_fraction": ()})
    patience: int = option(
        4, help="validations without an improvement before the training stops", low=1, rare=True, needs={"val_fraction": ()}
    )
    max_drift: float = option(
        0.1,
        help="change of the prediction on safe prompts at most, relative to the reference's error there",
        above=0,
        rare=True,
        needs={"val_fraction": ()},
    )
    # stability: running mean of the winner's error above its reference, relative to the reference
    displacement_warn: float = option(
        0.02, help="displacement of the winner's error, relative to the reference, that is warned of", above=0, rare=True
    )
    displacement_stop: float = option(0.2, help="displacement that stops the training", above=0, rare=True)
    displacement_window: int = option(50, help="steps that the displacement is averaged over", low=1, rare=True)
    # output
    checkpoint_every: int = option(100, help="steps between checkpoints", low=1)
    keep_checkpoints: int = option(2, help="latest checkpoints kept, besides the best", low=1, rare=True)
    sample_every: int = option(0, help="steps between image grids of four training prompts; 0 is off", low=0)
    sample_prompts: tuple[str, ...] = option(
        (), help="prompt of the image grids; four of the data if left out", rare=True, needs={"sample_every": ()}
    )
    sample_steps: int = option(20, help="denoising steps of a sample", low=1, rare=True, needs={"sample_every": ()})
    trackers: tuple[str, ...] = option(
        (), help="tensorboard, wandb, ... as accelerate names them; metrics.jsonl is always written", flags=("--tracker",)
    )

    def __post_init__(self) -> None:
        check_options(self)
        options = ADAPTERS[self.adapter]
        if options.adaptive and self.compile:
            raise UserError(f"PreferenceConfig.compile must be off with {self.adapter}, got True: its layers change. Leave it out.")
        if self.memory.eight_bit and self.optimizer != "adamw":
            raise UserError(f"memory.eight_bit is the state of adamw, got the optimizer {self.optimizer}. Leave one of them out.")
        OPTIMIZERS[self.optimizer_name]().check_installed()
        if self.alpha is not None and "alpha" not in {item.name for item in fields(options)}:  # type: ignore[arg-type]
            raise UserError(f"PreferenceConfig.alpha must be None with {self.adapter}, got {self.alpha}: it has none.")

    def recipe(self) -> dict[str, Any]:
        """The options that shape the result; a run resumes only if they are unchanged. The precision is the model's."""
        found = {RECORDED.get(name, name): value for name, value in asdict(self).items() if name not in EXECUTION}
        return found | ({"eight_bit": True} if self.memory.eight_bit else {})  # records of others have no such entry

    @property
    def optimizer_name(self) -> str:
        """In `OPTIMIZERS`."""
        return "adamw-eight-bit" if self.memory.eight_bit else self.optimizer

    def changed(self, given: Mapping[str, Any]) -> "PreferenceConfig":
        """With those of ``given`` that are options of this or of its `MemoryConfig`, by name."""
        return with_options(replace(self, memory=with_options(self.memory, given)), given)

    def schedule(self) -> Schedule:
        """Of the learning rate."""
        return Schedule(steps=self.steps, warmup=self.warmup_steps, decay=self.decay, peak=self.learning_rate)
