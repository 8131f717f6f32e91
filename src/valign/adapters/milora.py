"""MiLoRA (arXiv 2406.09044), by `valign.adapters.AILoRA`, as peft does not have it."""

from dataclasses import dataclass

from valign.adapters.ailora import AILoRA
from valign.adapters.base import AdapterHandle, AttachContext, LoraHandle, LowRankOptions


@dataclass(frozen=True, kw_only=True)
class MiloraOptions(LowRankOptions):
    """LoRA that starts on the smallest singular directions and freezes the rest."""

    def attach(self, context: AttachContext) -> AdapterHandle:
        network = self.new_lora(context)
        AILoRA(query=".*", value=".*", part_query="minor", part_value="minor")(network)
        return LoraHandle(network)
