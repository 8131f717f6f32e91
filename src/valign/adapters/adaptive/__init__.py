"""LoRA whose ranks, or modules, are found while it trains; each ends as plain LoRA."""

from typing import Any

from valign.adapters.adaptive.codyra import CoDyRA, continual_scores, image_text_loss, task_columns
from valign.adapters.adaptive.diffora import DiffoRA, gram_matrix, halves, share_unselected
from valign.adapters.adaptive.gate import threshold_schedule
from valign.adapters.adaptive.increlora import IncreLoRA
from valign.adapters.adaptive.sora import SoRA, prune_in_rounds

ADAPTIVE: dict[str, type[Any]] = {"codyra": CoDyRA, "diffora": DiffoRA, "increlora": IncreLoRA, "sora": SoRA}

__all__ = [
    "ADAPTIVE",
    "CoDyRA",
    "DiffoRA",
    "IncreLoRA",
    "SoRA",
    "continual_scores",
    "gram_matrix",
    "halves",
    "image_text_loss",
    "prune_in_rounds",
    "share_unselected",
    "task_columns",
    "threshold_schedule",
]
