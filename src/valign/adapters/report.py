"""What an initializer did."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class InitReport:
    """One initialization; modules are named without peft's prefix."""

    method: str
    adapter: str
    roles: Mapping[str, str]  # module -> what it started from
    trainable: int  # numbers that the adapter trains
    keeps_function: bool  # does the model answer as before, up to rounding?
    keeps_base: bool  # are the base weights untouched, so that switching the adapter off gives the base model?
    skipped: tuple[str, ...] = ()  # modules on the meta device, left to a checkpoint
