"""How a run keeps within the memory of its device: one block of options, ``memory:``, of every command that loads a model."""

from dataclasses import dataclass
from typing import Any, Literal

from valign.checks import UserError, check_options, option

Precision = Literal["auto", "float32", "bfloat16", "float16"]
AUTOCAST = {"auto": "no", "float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # accelerate's name of a precision
COMMON = ("precision", "gradient_checkpointing", "accumulation", "phased", "offload", "limit")  # flags where there are many others
SAMPLING = ("precision", "vae_slice", "vae_precision", "phased", "offload", "limit")  # flags where nothing is trained
TRAINING = ("gradient_checkpointing", "accumulation", "eight_bit")  # what takes effect only where something is trained
PAIRS = ("split_pairs",)  # only in a training on pairs
LATENTS = ("vae_slice", "vae_precision", "phased", "offload")  # only for models with an autoencoder and text encoders beside them


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What lies in memory, where, and in which precision. None leaves a choice to the command, which knows how much memory is free;
    elsewhere it is off.

    None of it changes a result beyond rounding, but for ``precision`` and ``eight_bit``, which round more.
    """

    precision: Precision = option(
        "auto", help="of forward passes and frozen weights; what trains stays float32. auto: float32 on a CPU, half of it on CUDA"
    )
    gradient_checkpointing: bool | None = option(
        None, help="recompute activations in the backward pass: much less memory, about a third more time"
    )
    accumulation: int | None = option(
        None, help="micro-batches per step and process, one after the other: less memory, the same gradients", low=1
    )
    split_pairs: bool | None = option(
        None, help="winners and losers one after the other: half the activations, a third more time, the same result"
    )
    eight_bit: bool = option(False, help="AdamW's state in 8 bits a number; needs bitsandbytes, and CUDA", rare=True)
    vae_slice: int | None = option(
        None, help="images that the autoencoder reads or makes at once; by their size if left out", low=1, rare=True
    )
    vae_precision: Literal["float32", "bfloat16", "float16"] = option(
        "float32", help="of the autoencoder; in float16 that of SDXL overflows", rare=True
    )
    phased: bool | None = option(
        None,
        help="a network is loaded when it is needed and freed after: text encoders, then the autoencoder, then the denoiser",
    )
    offload: bool | None = option(
        None, help="networks wait in main memory and visit the device when they are used: less memory of the card, more time"
    )
    limit: float | None = option(
        None, help="GB (10^9 bytes) that may be used; what is free if left out", above=0, flags=("--memory-limit",)
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.phased and self.offload:
            raise UserError(
                "memory.phased frees the networks that offload keeps in main memory: both cannot be on. Leave out one of them."
            )

    @property
    def micro_batches(self) -> int:
        """Per step and process; 1 where nobody chose."""
        return self.accumulation or 1

    def chosen(self) -> dict[str, Any]:
        """The options that somebody, or the free memory, chose, by name."""
        usual = MemoryConfig()
        return {name: value for name, value in vars(self).items() if value != getattr(usual, name)}

    def refuse_unused(self, *groups: tuple[str, ...], why: str) -> None:
        """Refuse options of these groups that were set where they change nothing.

        Args: why: Ends the sentence "memory.NAME has no effect".
        Raises: UserError for the first of them.
        """
        given = self.chosen()
        for name in (name for group in groups for name in group if name in given):
            raise UserError(f"memory.{name} has no effect {why}, got {given[name]!r}. Leave it out.")

    def said(self) -> str:
        """`chosen` as one writes it; "" for nothing."""
        known = {name: value for name, value in self.chosen().items() if name != "limit"}
        return ", ".join(f"{name} {_plain(value)}" for name, value in known.items() if value is not False)


def _plain(value: Any) -> str:
    return "on" if value is True else f"{value:g}" if isinstance(value, float) else str(value)
