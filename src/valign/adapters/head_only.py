"""A linear probe: the head trains, the network stays as it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valign.adapters.base import AdapterHandle, AdapterOptions, AttachContext


@dataclass(frozen=True, kw_only=True)
class HeadOnlyOptions(AdapterOptions):
    """Nothing of the network trains."""

    learning_rate: float = 2e-3  # unused: the head has its own

    def attach(self, context: AttachContext) -> AdapterHandle:
        if not context.head:
            raise ValueError("head must have a head to train, got a model without one. Choose an adapter.")
        return HeadOnlyHandle(context.network)


class HeadOnlyHandle(AdapterHandle):
    """No parameter of the network is trained, and there is nothing to save."""

    def groups(self) -> list[dict[str, Any]]:
        return []

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
