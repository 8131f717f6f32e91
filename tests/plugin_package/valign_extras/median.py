"""The median of the experts' changes, entry by entry."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from valign.checks import option
from valign.merging.delta_merge import DeltaMerge, Parts
from valign.merging.deltas import Delta, DenseDelta


@dataclass(frozen=True, kw_only=True)
class Median(DeltaMerge):
    """Take the median of the experts' weighted changes, entry by entry."""

    rank: int | None = option(None, help="rank of the result in every module; the error is reported", low=1)

    example: ClassVar[str] = "runs/hate runs/violence runs/sexual -o runs/median"

    def consensus(self, parts: Parts) -> Delta:
        return DenseDelta(torch.stack([weight * delta.delta() for weight, delta in parts()]).median(0).values)
