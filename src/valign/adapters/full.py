"""Full fine-tuning: every weight of the network trains."""

from dataclasses import dataclass

from valign.adapters.base import AdapterHandle, AdapterOptions, AttachContext
from valign.checks import check_range


@dataclass(frozen=True, kw_only=True)
class FullOptions(AdapterOptions):
    """Full fine-tuning."""

    learning_rate: float = 2e-5

    def __post_init__(self) -> None:
        check_range("FullOptions.learning_rate", self.learning_rate, above=0)

    def attach(self, context: AttachContext) -> AdapterHandle:
        context.network.requires_grad_(True)
        return AdapterHandle(context.network)
