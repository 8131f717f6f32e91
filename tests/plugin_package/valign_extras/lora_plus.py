"""LoRA whose B learns faster than its A (LoRA+, arXiv 2402.12354)."""

from dataclasses import dataclass
from typing import Any

from valign.adapters.base import AdapterHandle, AttachContext, LoraHandle, LowRankOptions
from valign.checks import check_range


@dataclass(frozen=True, kw_only=True)
class LoraPlusOptions(LowRankOptions):
    """Options of LoRA+."""

    ratio: float = 16.0  # learning rate of B over that of A, >= 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("LoraPlusOptions.ratio", self.ratio, low=1)

    def attach(self, context: AttachContext) -> AdapterHandle:
        return LoraPlusHandle(self.new_lora(context), self.ratio)


class LoraPlusHandle(LoraHandle):
    """A LoRA with a learning rate for A and another for B."""

    def __init__(self, network: Any, ratio: float) -> None:
        super().__init__(network)
        self.ratio = ratio

    def groups(self) -> list[dict[str, Any]]:
        named = [(name, parameter) for name, parameter in self.network.named_parameters() if parameter.requires_grad]
        ups = [parameter for name, parameter in named if "lora_B" in name]
        others = [parameter for name, parameter in named if "lora_B" not in name]
        return [{"params": others, "rate": 1.0}, {"params": ups, "rate": self.ratio}]
