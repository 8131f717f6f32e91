"""Optimizers, and perturbations of the weights while one steps; each file holds the maths and its options."""

from valign.optimizers.dct_adamw import DCTAdamW
from valign.optimizers.galore import GaLore
from valign.optimizers.ggpo import GGPO
from valign.optimizers.mgpo import MGPO
from valign.optimizers.registry import OPTIMIZERS, PERTURBATIONS
from valign.optimizers.trion import Trion

__all__ = ["GGPO", "MGPO", "OPTIMIZERS", "PERTURBATIONS", "DCTAdamW", "GaLore", "Trion"]
