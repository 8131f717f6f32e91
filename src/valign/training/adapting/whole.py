"""The two ends of the scale: train everything, or the head alone."""

from dataclasses import dataclass
from typing import Any

from valign.checks import check_range
from valign.training.adapting.base import Attached, Ground


@dataclass(frozen=True, kw_only=True)
class Full:
    """Full fine-tuning."""

    learning_rate: float = 2e-5

    def __post_init__(self) -> None:
        check_range("Full.learning_rate", self.learning_rate, above=0)

    def attach(self, ground: Ground) -> Attached:
        ground.network.requires_grad_(True)
        return Attached(ground.network)


@dataclass(frozen=True, kw_only=True)
class HeadOnly:
    """A linear probe: the network stays as it is."""

    learning_rate: float = 2e-3  # unused: the head has its own

    def attach(self, ground: Ground) -> Attached:
        if not ground.head:
            raise ValueError("head must have a head to train, got a model without one. Choose an adapter.")
        return AttachedNothing(ground.network)


class AttachedNothing(Attached):
    """No parameter of the network is trained, and there is nothing to save."""

    def groups(self) -> list[dict[str, Any]]:
        return []

    def save(self, folder: Any) -> None:
        folder.mkdir(parents=True)
