"""LoRA as peft has it (arXiv 2106.09685)."""

from dataclasses import dataclass
from typing import ClassVar

from valign.adapters.base import LowRankOptions


@dataclass(frozen=True, kw_only=True)
class LoraOptions(LowRankOptions):
    """``W + (alpha / rank) B A``; A is drawn, B is 0 at the start."""

    expert: ClassVar[bool] = True
    frozen_base: ClassVar[bool] = True
    convolutions: ClassVar[bool] = True
