"""Parameter-efficient fine-tuning on peft: each method is one file with its options, its maths and how it is attached."""

from valign.adapters.ailora import AILoRA
from valign.adapters.base import (
    AdapterHandle,
    AdapterOptions,
    AttachContext,
    InitReport,
    LoraHandle,
    LowRankOptions,
    adapter_bytes,
    default_targets,
)
from valign.adapters.clip_svd import ClipSvdConfig, singular_changes
from valign.adapters.codyra import CoDyRA, continual_scores, image_text_loss, task_columns
from valign.adapters.comp_lora import CompLoRA
from valign.adapters.diffora import DiffoRA, gram_matrix, halves, share_unselected
from valign.adapters.factors import adapter_state, export_lora, save_peft_lora
from valign.adapters.fila import FILA, fila_init, relative_importance, weighted_start
from valign.adapters.gate import threshold_schedule
from valign.adapters.increlora import IncreLoRA
from valign.adapters.loca import LocaConfig, LocaSchedule
from valign.adapters.loldu import LolduConfig
from valign.adapters.lora_sb import LoRASB
from valign.adapters.nola import NolaConfig
from valign.adapters.randlora import randlora_config, set_randlora_scale
from valign.adapters.registry import ADAPTERS, EXPERTS, INITIALIZERS, TUNERS, initialize, register_tuners
from valign.adapters.sora import SoRA, prune_in_rounds
from valign.adapters.svfit import SvfitConfig
from valign.adapters.tuner import lora_factors

__all__ = [
    "ADAPTERS",
    "EXPERTS",
    "FILA",
    "INITIALIZERS",
    "TUNERS",
    "AILoRA",
    "AdapterHandle",
    "AdapterOptions",
    "AttachContext",
    "ClipSvdConfig",
    "CoDyRA",
    "CompLoRA",
    "DiffoRA",
    "IncreLoRA",
    "InitReport",
    "LoRASB",
    "LocaConfig",
    "LocaSchedule",
    "LolduConfig",
    "LoraHandle",
    "LowRankOptions",
    "NolaConfig",
    "SoRA",
    "SvfitConfig",
    "adapter_bytes",
    "adapter_state",
    "continual_scores",
    "default_targets",
    "export_lora",
    "fila_init",
    "gram_matrix",
    "halves",
    "image_text_loss",
    "initialize",
    "lora_factors",
    "prune_in_rounds",
    "randlora_config",
    "register_tuners",
    "relative_importance",
    "save_peft_lora",
    "set_randlora_scale",
    "share_unselected",
    "singular_changes",
    "task_columns",
    "threshold_schedule",
    "weighted_start",
]
