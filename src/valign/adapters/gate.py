"""A gate on each rank component, the step that shuts small gates, and how surviving ranks are counted. SoRA and CoDyRA share it."""

from collections.abc import Mapping
from math import exp, log
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from valign.adapters.base import check_precision
from valign.adapters.factors import FactorVariant, LoraFactors, add_parameter, fresh_linears, lora_layers, mark
from valign.checks import check_choice, check_range

Prox = Literal["soft", "reference"]
Spacing = Literal["linear", "log_linear", "exp_linear"]


class Gated(FactorVariant):
    """``scale * B diag(g) A``: LoRA's scale, or 1."""

    def __init__(self, *, scaled: bool = True) -> None:
        self.scaled = scaled

    def factors(self, layer: Any, name: str) -> LoraFactors:
        down, scale = layer.lora_A[name].weight, float(layer.scaling[name]) if self.scaled else 1.0
        return LoraFactors((layer.lora_gate[name][:, None] * down).to(down.dtype), layer.lora_B[name].weight, scale)

    def exported(self, layer: Any, name: str) -> LoraFactors:
        """Without the components whose gate is 0; the scale stays that of the full rank."""
        gate, full = layer.lora_gate[name], self.factors(layer, name)
        keep = gate != 0
        return LoraFactors(layer.lora_A[name].weight[keep], full.up[:, keep] * gate[keep], full.scale)


def soft_threshold(gate: Float[Tensor, " rank"], threshold: float) -> Float[Tensor, " rank"]:
    """``sign(g) max(|g| - threshold, 0)``, the minimizer of ``0.5 (u - g)^2 + threshold |u|``."""
    check_range("soft_threshold.threshold", threshold, low=0)
    return gate.sign() * (gate.abs() - threshold).clamp(min=0)


def reference_threshold(gate: Float[Tensor, " rank"], threshold: float) -> Float[Tensor, " rank"]:
    """What the reference codes of SoRA and CoDyRA do: three masked updates, each on the outcome of the one before.

    So ``|g| < 2 threshold`` goes to 0, except ``|g| == threshold``, which is left alone; a larger one shrinks by ``threshold``.
    """
    check_range("reference_threshold.threshold", threshold, low=0)
    moved = torch.where(gate > threshold, gate - threshold, gate)
    moved = torch.where(moved < -threshold, moved + threshold, moved)
    return torch.where(moved.abs() < threshold, torch.zeros_like(moved), moved)


PROX = {"soft": soft_threshold, "reference": reference_threshold}


def threshold_schedule(first: float, last: float, length: int, spacing: Spacing = "linear") -> list[float]:
    """``length`` thresholds from ``first`` to ``last``.

    ``"linear"`` evenly; ``"log_linear"`` the logarithms of even steps between their exponentials; ``"exp_linear"`` geometrically.
    Raises: ValueError for ``last < first``, fewer than two, a negative one, or ``"exp_linear"`` from 0.
    """
    check_choice("threshold_schedule.spacing", spacing, ("linear", "log_linear", "exp_linear"))
    check_range("threshold_schedule.first", first, low=0)
    check_range("threshold_schedule.last", last, low=first)
    check_range("threshold_schedule.length", length, low=2)
    shares = [index / (length - 1) for index in range(length)]
    if spacing == "linear":
        return [first + share * (last - first) for share in shares]
    if spacing == "log_linear":
        return [log(exp(first) + share * (exp(last) - exp(first))) for share in shares]
    check_range("threshold_schedule.first", first, above=0, hint="A geometric spacing cannot start at 0.")
    return [first * (last / first) ** share for share in shares]


def install_gates(
    model: nn.Module, adapter: str, method: str, *, generator: torch.Generator, scaled: bool, ones: bool = False
) -> dict[str, Any]:
    """Put a float32 gate, from N(0, 1) or all ones, on every component of a new LoRA; return its layers."""
    layers = fresh_linears(model, adapter, method)
    for layer in layers.values():
        device = layer.lora_A[adapter].weight.device
        draw = torch.randn(layer.r[adapter], generator=generator, device=generator.device)
        add_parameter(layer, "lora_gate", adapter, (torch.ones_like(draw) if ones else draw).to(device))
        layer.lora_variant[adapter] = Gated(scaled=scaled)
        mark(layer, adapter, method)
    return layers


def gates(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The gate of each module."""
    return {name: layer.lora_gate[adapter] for name, layer in lora_layers(model, adapter).items()}


@torch.no_grad()
def shut(found: Mapping[str, nn.Parameter], threshold: float, prox: Prox) -> None:
    """Apply the proximal step to every gate in place; a threshold of 0 changes nothing.

    Raises: TypeError for gates in half precision.
    """
    check_precision("gates", found.values())
    for gate in found.values():
        gate.copy_(PROX[prox](gate, threshold))


def surviving(found: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Components per module whose gate is not 0."""
    return {name: int(gate.count_nonzero()) for name, gate in found.items()}
