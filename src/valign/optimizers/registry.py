"""The tables of optimizers, and of what perturbs the weights beside one, by name."""

from collections.abc import Mapping

from valign.optimizers.adafactor import AdafactorOptions
from valign.optimizers.adamw import AdamWOptions
from valign.optimizers.adamw_eight_bit import AdamWEightBitOptions
from valign.optimizers.base import OptimizerOptions
from valign.optimizers.dct_adamw import DCTAdamWOptions
from valign.optimizers.galore import GaLoreOptions
from valign.optimizers.ggpo import GGPOOptions
from valign.optimizers.mgpo import MGPOOptions
from valign.optimizers.perturbation import PerturbationOptions
from valign.optimizers.trion import TrionOptions
from valign.plugins import with_plugins

OPTIMIZERS: Mapping[str, type[OptimizerOptions]] = with_plugins(
    "valign.optimizers",
    {
        "adamw": AdamWOptions,
        "adamw-eight-bit": AdamWEightBitOptions,
        "adafactor": AdafactorOptions,
        "dct-adamw": DCTAdamWOptions,
        "galore": GaLoreOptions,
        "trion": TrionOptions,
    },
)
PERTURBATIONS: Mapping[str, type[PerturbationOptions]] = with_plugins(
    "valign.perturbations", {"ggpo": GGPOOptions, "mgpo": MGPOOptions}
)
