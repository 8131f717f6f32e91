"""SG-LoRA: LoRA weights for a new task from its description and a library of experts (arXiv 2509.10535)."""

from valign.adapters.sg_lora.cvae import SemanticCvae
from valign.adapters.sg_lora.files import load_sg_lora, save_sg_lora
from valign.adapters.sg_lora.generation import SgLora, SgLoraConfig, fit_sg_lora
from valign.adapters.sg_lora.library import Condition, ExpertLibrary, LoraSchema, TaskExpert, aggregate, build_library, fingerprint

__all__ = [
    "Condition",
    "ExpertLibrary",
    "LoraSchema",
    "SemanticCvae",
    "SgLora",
    "SgLoraConfig",
    "TaskExpert",
    "aggregate",
    "build_library",
    "fingerprint",
    "fit_sg_lora",
    "load_sg_lora",
    "save_sg_lora",
]
