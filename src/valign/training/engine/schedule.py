"""The learning rate of each step. A function of the step, so there is nothing to save and restore."""

from dataclasses import dataclass
from math import cos, pi
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A linear warm-up to ``peak``, then constant, or falling over the remaining steps.

    ``peak`` is a learning rate, or 1 where each parameter group has a peak of its own, see `keep_peaks`.
    """

    steps: int  # of the whole training
    warmup: int = 0  # steps of the warm-up
    reached: int | None = None  # step (from 1) at which the warm-up's line meets the peak; None is ``warmup``
    decay: Literal["none", "linear", "cosine"] = "none"
    floor: float = 0.0  # where a cosine ends, as a share of the peak
    peak: float = 1.0

    def at(self, step: int) -> float:
        """The rate of step ``step`` (from 0), > 0 before the last step's end."""
        if step < self.warmup:
            return self.peak * (step + 1) / (self.reached or self.warmup)
        if self.decay == "none":
            return self.peak
        left = max(self.steps - self.warmup, 1)
        if self.decay == "linear":
            return self.peak * ((self.steps - step) / left)
        return self.peak * (self.floor + (1 - self.floor) * (1 + cos(pi * (step - self.warmup) / left)) / 2)


def keep_peaks(optimizer: torch.optim.Optimizer) -> None:
    """Remember each group's learning rates as what a schedule with peak 1 multiplies."""
    for group in optimizer.param_groups:
        group["peaks"] = {name: group[name] for name in ("lr", "adam_lr") if name in group}


def set_rates(optimizer: torch.optim.Optimizer, scheduled: float) -> float:
    """Set every group's learning rates to its peak (without `keep_peaks`: 1) times its factor ``rate`` times ``scheduled``.

    Returns the first group's learning rate without its factor, for the log.
    """
    for group in optimizer.param_groups:
        for name, peak in group.get("peaks", {"lr": 1.0}).items():
            group[name] = peak * group.get("rate", 1.0) * scheduled
    first: float = optimizer.param_groups[0].get("peaks", {"lr": 1.0})["lr"]
    return scheduled * first
