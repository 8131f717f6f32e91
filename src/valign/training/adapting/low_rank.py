"""LoRA and its initializers: peft's own starts, and those of `valign.adapters`."""

from dataclasses import dataclass
from math import ceil
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from valign.adapters import AILoRA, CompLoRA, LoRASB
from valign.adapters.comp_lora import Side
from valign.adapters.lora_factors import START, add_buffer, lora_layers
from valign.adapters.lora_sb import FLOOR
from valign.checks import check_range
from valign.training.adapting.base import AdapterHandle, AttachContext, LoraHandle, seeded

ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA (arXiv 2106.09685): ``W + (alpha / rank) B A``."""

    rank: int = 8
    alpha: float | None = None  # None is the rank: scale 1
    dropout: float = 0.0
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_range(f"{owner}.rank", self.rank, low=1)
        check_range(f"{owner}.learning_rate", self.learning_rate, above=0)
        check_range(f"{owner}.dropout", self.dropout, low=0, high=1)
        if self.alpha is not None:
            check_range(f"{owner}.alpha", self.alpha, above=0)

    def attach(self, context: AttachContext) -> AdapterHandle:
        return LoraHandle(self.lora(context))

    def lora(self, context: AttachContext, **options: Any) -> Any:
        """A new LoRA on the network, trainable."""
        alpha = self.rank if self.alpha is None else self.alpha
        given = {"r": self.rank, "lora_alpha": alpha, "lora_dropout": self.dropout, "target_modules": list(context.targets)}
        with seeded(context):
            return get_peft_model(context.network, LoraConfig(**{**given, **options}))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Pissa(Lora):
    """PiSSA (arXiv 2404.02948) as peft has it: starts on the largest singular directions and freezes the rest."""

    def attach(self, context: AttachContext) -> AdapterHandle:
        network = self.lora(context, init_lora_weights="pissa")
        note_start(network)
        return LoraHandle(network)


@dataclass(frozen=True, kw_only=True)
class Milora(Lora):
    """MiLoRA (arXiv 2406.09044): starts on the smallest singular directions; peft has none, so AILoRA's minor half everywhere."""

    def attach(self, context: AttachContext) -> AdapterHandle:
        network = self.lora(context)
        AILoRA(query=".*", value=".*", part_query="minor", part_value="minor")(network)
        return LoraHandle(network)


@dataclass(frozen=True, kw_only=True)
class Dora(Lora):
    """DoRA (arXiv 2402.09353) as peft has it: a magnitude per output beside LoRA's direction."""

    def attach(self, context: AttachContext) -> AdapterHandle:
        return AdapterHandle(self.lora(context, use_dora=True))


@dataclass(frozen=True, kw_only=True)
class Ailora(Lora):
    """`valign.adapters.AILoRA`."""

    def attach(self, context: AttachContext) -> AdapterHandle:
        network = self.lora(context)
        AILoRA()(network)
        return LoraHandle(network)


@dataclass(frozen=True, kw_only=True)
class CompLora(Lora):
    """`valign.adapters.CompLoRA`."""

    side: Side = "both"
    energy: float = 0.9  # of the squared norm that is protected, (0, 1)

    def attach(self, context: AttachContext) -> AdapterHandle:
        network = self.lora(context)
        CompLoRA(side=self.side, energy=self.energy)(network)
        return LoraHandle(network)


@dataclass(frozen=True, kw_only=True)
class LoraSB(Lora):
    """`valign.adapters.LoRASB`, its start taken on the training rows."""

    rank: int = 24  # trains rank^2 numbers per module
    samples: int = FLOOR  # rows for the gradient, at least

    def attach(self, context: AttachContext) -> AdapterHandle:
        network, batches = self.lora(context), ceil(self.samples / context.batch_size)
        LoRASB(
            samples=range(batches),
            count=batches,
            loss=lambda _, number: context.loss(number, None),
            learning_rate=self.learning_rate * context.first_rate,
            allow_scale=True,
        )(network)
        return LoraHandle(network)


def note_start(network: nn.Module) -> None:
    """Remember factors that peft took out of the base weights, so that `export_lora` counts the change from the original ones."""
    for layer in lora_layers(network, ADAPTER).values():
        for attribute, factor in zip(START, (layer.lora_A, layer.lora_B), strict=True):
            add_buffer(layer, attribute, ADAPTER, factor[ADAPTER].weight.detach().clone())
