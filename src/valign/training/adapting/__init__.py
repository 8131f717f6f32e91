"""Every way to fine-tune a network that the house has, and its baselines, behind one interface and one string each."""

from valign.training.adapting.base import AdapterHandle, AdapterOptions, AttachContext, LoraHandle, adapter_bytes, default_targets
from valign.training.adapting.tuning import ADAPTERS, OPTIMIZERS, PERTURBATIONS, Tuning, parse_tuning

__all__ = [
    "ADAPTERS",
    "OPTIMIZERS",
    "PERTURBATIONS",
    "AdapterHandle",
    "AdapterOptions",
    "AttachContext",
    "LoraHandle",
    "Tuning",
    "adapter_bytes",
    "default_targets",
    "parse_tuning",
]
