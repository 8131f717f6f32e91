"""Losses on denoising errors: pure maths on tensors, one file per method, one value per pair."""

from collections.abc import Mapping
from typing import Any

from valign.objectives.erasing.esd import ErasedTarget
from valign.objectives.min_snr import min_snr_weight
from valign.objectives.preference.diffusion_dpo import DiffusionDPO
from valign.objectives.preference.livo import LiVO
from valign.objectives.preference.pair_errors import PairErrors, PairObjective, denoising_error
from valign.objectives.preference.winner_safeguard import loser_scale
from valign.plugins import with_plugins

# A row is a frozen dataclass whose instances are `PairObjective`s.
OBJECTIVES: Mapping[str, type[Any]] = with_plugins("valign.objectives", {"diffusion-dpo": DiffusionDPO, "livo": LiVO})

__all__ = [
    "OBJECTIVES",
    "DiffusionDPO",
    "ErasedTarget",
    "LiVO",
    "PairErrors",
    "PairObjective",
    "denoising_error",
    "loser_scale",
    "min_snr_weight",
]
