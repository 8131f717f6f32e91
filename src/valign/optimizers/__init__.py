"""Optimizers, and perturbations of the weights while one steps."""

from valign.optimizers.dct_adamw import DCTAdamW
from valign.optimizers.galore import GaLore
from valign.optimizers.ggpo import GGPO
from valign.optimizers.mgpo import MGPO
from valign.optimizers.trion import Trion

OPTIMIZERS: dict[str, type[DCTAdamW] | type[GaLore] | type[Trion]] = {"dct-adamw": DCTAdamW, "galore": GaLore, "trion": Trion}
PERTURBATIONS: dict[str, type[GGPO] | type[MGPO]] = {"ggpo": GGPO, "mgpo": MGPO}  # beside any optimizer that trains a LoRA

__all__ = ["GGPO", "MGPO", "OPTIMIZERS", "PERTURBATIONS", "DCTAdamW", "GaLore", "Trion"]
