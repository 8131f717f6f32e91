"""A tuner's change as plain LoRA factors, which every tool reads."""

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from valign.adapters.tuners.layer import tuner_layers
from valign.models.files.adapter_files import LoraFactors


@torch.no_grad()
def lora_factors(model: nn.Module, adapter: str = "default") -> dict[str, LoraFactors]:
    """Exact factors of every module's change, scale folded into ``up``; `save_adapter` writes them.

    The rank is the method's: r for SVFit, LoLDU and NOLA, up to the full rank for CLIP-SVD, the number of coefficients for LoCA.
    For a smaller one truncate with `peft.convert_to_lora`, or merge.

    Returns: By module name without peft's ``base_model.model.``, on the CPU.
    Raises: ValueError if there is no such adapter, or it sits on convolutions or transposed layers, which these files do not hold.
    """
    found = {}
    for name, layer in tuner_layers(model):
        if adapter not in layer.scaling:
            continue
        if isinstance(layer.get_base_layer(), (_ConvNd, Conv1D)):
            raise ValueError(f"lora_factors.model must have its adapter on nn.Linear, got {name}. Merge it instead.")
        factors = layer.factors(adapter)
        down, up = factors.down.cpu(), (factors.up * layer.scaling[adapter]).cpu()
        found[name.removeprefix("base_model.model.")] = LoraFactors(down.contiguous(), up.contiguous(), 1.0)
    if not found:
        raise ValueError(f"lora_factors.model must have an adapter of valign.adapters.tuners called {adapter!r}, got none.")
    return found
