"""PiSSA as peft has it (arXiv 2404.02948)."""

from dataclasses import dataclass

from torch import nn

from valign.adapters.base import AdapterHandle, AttachContext, LoraHandle, LowRankOptions
from valign.adapters.factors import START, add_buffer, lora_layers, only_adapter, save_for_any_base


@dataclass(frozen=True, kw_only=True)
class PissaOptions(LowRankOptions):
    """LoRA that starts on the largest singular directions and freezes the rest."""

    def attach(self, context: AttachContext) -> AdapterHandle:
        network = self.new_lora(context, init_lora_weights="pissa")
        note_start(network)
        return LoraHandle(network)


def note_start(network: nn.Module) -> None:
    """Remember factors that peft took out of the base weights, so that `export_lora` counts the change from the original ones."""
    adapter = only_adapter(network, None)
    for layer in lora_layers(network, adapter).values():
        for attribute, factor in zip(START, (layer.lora_A, layer.lora_B), strict=True):
            add_buffer(layer, attribute, adapter, factor[adapter].weight.detach().clone())
    save_for_any_base(network, adapter)
