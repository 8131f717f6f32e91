"""Parameter-efficient methods on peft, one file per method: initializers of LoRA here, tuners and adaptive rank in folders."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import nn

from valign.adapters.ailora import AILoRA
from valign.adapters.comp_lora import CompLoRA
from valign.adapters.lora_factors import adapter_state, export_lora, save_peft_lora
from valign.adapters.lora_sb import LoRASB
from valign.adapters.report import InitReport
from valign.checks import check_choice

INITIALIZERS: dict[str, Callable[..., Callable[..., InitReport]]] = {
    "ailora": AILoRA,
    "comp-lora": CompLoRA,
    "lora-sb": LoRASB,
}


def initialize(model: nn.Module, method: str, *, adapter: str | None = None, **options: Any) -> InitReport:
    """Give the LoRA on ``model`` the start of ``method``, in place.

    Args:
        model: A ``PeftModel``, or a transformers or diffusers model with ``add_adapter``; its LoRA as
            ``init_lora_weights=True`` makes it.
        method: A name in `INITIALISERS`.
        adapter: The adapter's name; None is the only one.
        options: Fields of the method's dataclass.
    Raises: ValueError for an unknown method or option, and whatever the method refuses.
    """
    check_choice("initialize.method", method, INITIALIZERS)
    known = [field.name for field in fields(INITIALIZERS[method])]  # type: ignore[arg-type]
    for name in options:
        check_choice(f"initialize option of {method}", name, known)
    return INITIALIZERS[method](**options)(model, adapter)


__all__ = [
    "INITIALIZERS",
    "AILoRA",
    "CompLoRA",
    "InitReport",
    "LoRASB",
    "adapter_state",
    "export_lora",
    "initialize",
    "save_peft_lora",
]
