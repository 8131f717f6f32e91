"""The two ends of the scale: train everything, or the head alone."""

from dataclasses import dataclass
from typing import Any

from valign.checks import check_range
from valign.training.adapting.base import AdapterHandle, AttachContext


@dataclass(frozen=True, kw_only=True)
class Full:
    """Full fine-tuning."""

    learning_rate: float = 2e-5

    def __post_init__(self) -> None:
        check_range("Full.learning_rate", self.learning_rate, above=0)

    def attach(self, context: AttachContext) -> AdapterHandle:
        context.network.requires_grad_(True)
        return AdapterHandle(context.network)


@dataclass(frozen=True, kw_only=True)
class HeadOnly:
    """A linear probe: the network stays as it is."""

    learning_rate: float = 2e-3  # unused: the head has its own

    def attach(self, context: AttachContext) -> AdapterHandle:
        if not context.head:
            raise ValueError("head must have a head to train, got a model without one. Choose an adapter.")
        return HeadOnlyHandle(context.network)


class HeadOnlyHandle(AdapterHandle):
    """No parameter of the network is trained, and there is nothing to save."""

    def groups(self) -> list[dict[str, Any]]:
        return []

    def save(self, folder: Any) -> None:
        folder.mkdir(parents=True)
