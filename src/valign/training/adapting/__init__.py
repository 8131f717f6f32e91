"""Every way to fine-tune a network that the house has, and its peers, behind one interface and one string each."""

from valign.training.adapting.base import Adapting, Attached, AttachedLora, Ground, adapter_bytes, default_targets
from valign.training.adapting.tuning import ADAPTERS, OPTIMIZERS, PERTURBATIONS, Tuning, parse_tuning

__all__ = [
    "ADAPTERS",
    "OPTIMIZERS",
    "PERTURBATIONS",
    "Adapting",
    "Attached",
    "AttachedLora",
    "Ground",
    "Tuning",
    "adapter_bytes",
    "default_targets",
    "parse_tuning",
]
