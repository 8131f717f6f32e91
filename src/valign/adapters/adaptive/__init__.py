"""LoRA whose ranks, or modules, are found while it trains; each ends as plain LoRA."""

from typing import Any

from valign.adapters.adaptive.codyra import CoDyRA, continual_scores
from valign.adapters.adaptive.diffora import DiffoRA, halves, share_unselected
from valign.adapters.adaptive.increlora import IncreLoRA
from valign.adapters.adaptive.sora import SoRA

ADAPTIVE: dict[str, type[Any]] = {"codyra": CoDyRA, "diffora": DiffoRA, "increlora": IncreLoRA, "sora": SoRA}

__all__ = ["ADAPTIVE", "CoDyRA", "DiffoRA", "IncreLoRA", "SoRA", "continual_scores", "halves", "share_unselected"]
