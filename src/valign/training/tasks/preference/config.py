"""Every number of a preference training, with its unit and where the default comes from."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from valign.checks import UserError, check_choice, check_range
from valign.training.engine.schedule import Schedule

Adaptive = Literal["sora", "codyra", "increlora", "diffora"]  # ranks or modules are found while training
Adapter = Literal["lora", "ailora", "comp-lora", "lora-sb", Adaptive]  # how the LoRA starts, and what of it trains
ADAPTIVE: tuple[str, ...] = get_args(Adaptive)
ADAPTERS: tuple[str, ...] = get_args(Adapter)

# They change where, how fast or how visibly a training runs, not what it computes (beyond rounding): a run may resume with others.
EXECUTION = (
    "accumulation",
    "split_pairs",
    "gradient_checkpointing",
    "compile",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_every",
    "sample_prompts",
    "sample_steps",
    "trackers",
)


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """One LoRA trained on pairs (caption, winner, loser). Defaults: Stable Diffusion 1.5 as in AlignGuard (arXiv 2412.10493)."""

    # adapter
    adapter: Adapter = "lora"
    rank: int = 4
    alpha: float | None = None  # LoRA scale is alpha / rank; None is rank, so scale 1
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # linears of every attention, self and cross
    init_seed: int = 0  # of the A factors; experts that will be merged share it
    # optimizer
    optimizer: Literal["adamw", "adafactor"] = "adamw"  # adafactor: fixed rate, no momentum, its own clipping; the authors' on SDXL
    learning_rate: float = 1.6e-4  # per step; 1e-5 times 16 pairs, as `scale_lr` does on one GPU
    weight_decay: float = 0.01
    warmup_steps: int = 200  # linear from 0
    decay: Literal["none", "cosine"] = "none"  # after the warm-up: constant, or half a cosine that ends at 0
    max_grad_norm: float = 1.0  # over all factors; 0 is off. Not used with adafactor
    # amount
    steps: int = 2000
    pairs_per_step: int = 16  # over all processes and micro-batches
    accumulation: int = 1  # micro-batches a process takes one after the other within a step
    seed: int = 0  # of the order of pairs and of every draw
    # loss
    empty_prompt_prob: float = (
        0.1  # caption replaced by "", once per pair; also moves the unconditional branch of guidance. Authors: 0.2
    )
    flip: bool = (
        True  # mirror both images of a pair, or neither, half of the time; needs mirrored latents. Off if left and right matter
    )
    sft_weight: float = 0.0  # times the winner's mean squared error, added to the loss; holds the winner's error down
    winner_safeguard: float | None = None  # mu of `loser_scale`, [0, 1]; the authors' launcher has 0.9. None is off
    min_snr: float | None = None  # gamma of `min_snr_weight` on all four errors; 5 in the paper. None is off
    safe_prompt_term: bool = False  # add the same loss under the safe twin's caption, weight 1
    retain_weight: float = 0.0  # times the squared move away from the base under benign captions, added to the loss
    precompute_ref_draws: int = 0  # K fixed draws per pair with reference errors computed once; pays off from K epochs on. 0 is off
    # memory and precision
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # autocast of the forward passes; errors and factors stay float32
    split_pairs: bool = False  # winners and losers one after the other: the same gradient, half the activations, a third more time
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of the U-Net in steps: pays off in long trainings; needs a compiler (g++, Triton)
    # validation on held-out pairs
    val_fraction: float = 0.1  # of the pairs, chosen by hash of their id; 0 is off
    val_pairs: int = 32  # at most
    val_draws: int = 4  # fixed timesteps per pair, one from each quarter of the schedule
    validate_every: int = 50  # steps
    patience: int = 4  # validations without an improvement before the training stops
    max_drift: float = 0.1  # change of the prediction on safe prompts, relative to the reference's error there; see `Validator`
    # stability: running mean of the winner's error above its reference, relative to the reference
    alarm_warn: float = 0.02
    alarm_stop: float = 0.2
    alarm_window: int = 50  # steps
    # output
    checkpoint_every: int = 100  # steps
    keep_checkpoints: int = 2  # latest ones, besides the best
    sample_every: int = 0  # steps between image grids; 0 is off
    sample_prompts: tuple[str, ...] = ()
    sample_steps: int = 20  # denoising steps of a sample
    trackers: tuple[str, ...] = ()  # names that accelerate knows: tensorboard, wandb, mlflow, ...; metrics.jsonl is always written

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "pairs_per_step", "accumulation", "val_pairs", "val_draws", "validate_every"):
            check_range(f"PreferenceConfig.{name}", float(getattr(self, name)), low=1.0)
        for name in ("patience", "alarm_window", "checkpoint_every", "keep_checkpoints", "sample_steps"):
            check_range(f"PreferenceConfig.{name}", float(getattr(self, name)), low=1.0)
        for name in ("learning_rate", "max_drift", "alarm_warn", "alarm_stop"):
            check_range(f"PreferenceConfig.{name}", getattr(self, name), above=0.0)
        for name in ("weight_decay", "warmup_steps", "max_grad_norm", "sft_weight", "retain_weight"):
            check_range(f"PreferenceConfig.{name}", float(getattr(self, name)), low=0.0)
        for name in ("precompute_ref_draws", "sample_every"):
            check_range(f"PreferenceConfig.{name}", float(getattr(self, name)), low=0.0)
        check_range("PreferenceConfig.empty_prompt_prob", self.empty_prompt_prob, low=0.0, high=1.0)
        check_range("PreferenceConfig.val_fraction", self.val_fraction, low=0.0, high=0.5)
        check_choice("PreferenceConfig.adapter", self.adapter, ADAPTERS)
        if self.adapter in ADAPTIVE and self.compile:
            raise UserError(f"PreferenceConfig.compile must be off with {self.adapter}, got True: its layers change. Leave it out.")
        if self.adapter == "increlora" and self.alpha is not None:
            raise UserError(f"PreferenceConfig.alpha must be None with increlora, got {self.alpha}: its scale goes with its rank.")
        check_choice("PreferenceConfig.decay", self.decay, ("none", "cosine"))
        check_choice("PreferenceConfig.optimizer", self.optimizer, ("adamw", "adafactor"))
        check_choice("PreferenceConfig.mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        if self.alpha is not None:
            check_range("PreferenceConfig.alpha", self.alpha, above=0.0)
        if self.winner_safeguard is not None:
            check_range("PreferenceConfig.winner_safeguard", self.winner_safeguard, low=0.0, high=1.0)
        if self.min_snr is not None:
            check_range("PreferenceConfig.min_snr", self.min_snr, above=0.0)

    def recipe(self) -> dict[str, Any]:
        """The options that shape the result; a run resumes only if they are unchanged."""
        return {name: value for name, value in asdict(self).items() if name not in EXECUTION}

    def schedule(self) -> Schedule:
        """Of the learning rate."""
        return Schedule(steps=self.steps, warmup=self.warmup_steps, decay=self.decay, peak=self.learning_rate)
