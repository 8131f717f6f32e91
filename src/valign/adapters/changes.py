"""How far each adapted weight is from where it was, on the graph of what is trained, whatever the adapter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from valign.adapters.factors import START, FactorVariant, against_start, plain, weight_of
from valign.adapters.tuner_layer import TunerLayer
from valign.checks import UserError

PEFT = "base_model.model."


@dataclass(frozen=True)
class ChangeFactors:
    """``up @ down``, or ``up`` itself where ``down`` is None."""

    up: Float[Tensor, "fan_out rank"]
    down: Float[Tensor, "rank fan_in"] | None = None


def adapted_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that an adapter changes, by name without peft's prefix; of a network without one, the linear layers that train.

    Raises: UserError if there are none, or one is not linear.
    """
    tuned: dict[str, Any] = {n: module for n, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
    if not tuned:
        heads = {id(head) for head in (_head(network),) if head is not None}
        tuned = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear) and module.weight.requires_grad and id(module) not in heads
        }
    if not tuned:
        raise UserError("The network must have weights that are adapted, got none. Choose another adapter than the head's.")
    for name, module in tuned.items():
        base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if base.weight.ndim != 2:
            raise UserError(f"Changes are read of linear layers, got {name}, a {type(base).__name__}. Leave it out of --targets.")
    return {name.removeprefix(PEFT): module for name, module in sorted(tuned.items())}


def change_of(layer: nn.Module, start: Tensor | None = None) -> ChangeFactors:
    """The change of the layer's weight, ``[fan_out, fan_in]``, with gradients.

    Args:
        start: Of a layer without an adapter, its weight as it was.
    Raises: UserError for an adapter whose change cannot be read with gradients.
    """
    if not isinstance(layer, BaseTunerLayer):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        assert start is not None
        return ChangeFactors(weight - start)
    (name,) = layer.active_adapters
    for kind, read in READERS.items():
        if isinstance(layer, kind):
            return read(layer, name)
    delta: Tensor = layer.get_delta_weight(name)  # type: ignore[operator]
    if not delta.requires_grad:
        raise UserError(f"{type(layer).__name__} must give its change with gradients, got none. Choose another adapter.")
    return ChangeFactors(delta.T if getattr(layer, "fan_in_fan_out", False) else delta)


def _head(network: nn.Module) -> nn.Module | None:
    """The output embeddings of a language model."""
    find: Callable[[], nn.Module | None] | None = getattr(network, "get_output_embeddings", None)
    return find() if find is not None else None


def _lora(layer: Any, name: str) -> ChangeFactors:
    if name not in layer.lora_A:
        nothing = weight_of(layer)
        return ChangeFactors(nothing.new_zeros(len(nothing), 1), nothing.new_zeros(1, nothing.shape[1]))
    variant = layer.lora_variant.get(name)
    if isinstance(variant, DoraLinearVariant):
        return _dora(layer, name)
    if isinstance(variant, FactorVariant):
        lora = variant.factors(layer, name)
    else:
        lora = against_start(layer, name) if name in getattr(layer, START[0], {}) else plain(layer, name)
    return ChangeFactors(lora.up * lora.scale, lora.down)


def _dora(layer: Any, name: str) -> ChangeFactors:
    """``(m / |V| - 1) W + (m / |V|) s B A`` with ``V = W + s B A``, row norms without gradients, as in its forward pass."""
    weight, lora = weight_of(layer), plain(layer, name)
    low_rank = lora.scale * lora.up @ lora.down
    ratio = layer.lora_magnitude_vector[name].weight / (weight + low_rank).norm(dim=1).detach()
    return ChangeFactors((ratio - 1)[:, None] * weight + ratio[:, None] * low_rank)


def _adalora(layer: Any, name: str) -> ChangeFactors:
    scale = layer.scaling[name] / (layer.ranknum[name] + 1e-5)
    return ChangeFactors(layer.lora_B[name] * scale, layer.lora_A[name] * layer.lora_E[name])


def _tuner(layer: TunerLayer, name: str) -> ChangeFactors:
    factors = layer.factors(name)
    return ChangeFactors(factors.up * layer.scaling[name], factors.down)


READERS: Mapping[type, Callable[[Any, str], ChangeFactors]] = {
    AdaLoraLayer: _adalora,
    LoraLayer: _lora,
    TunerLayer: _tuner,
}


class WeightChanges:
    """Reads the change of every adapted weight since this was made; the reference is the adapter as it then stands."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        bare = {name: layer for name, layer in adapted_layers(network).items() if not isinstance(layer, BaseTunerLayer)}
        self._weights = {name: layer.weight.detach().clone() for name, layer in bare.items()}  # type: ignore[operator]
        self._start = {name: found for name, found in self._dense().items() if found.any()}

    def now(self) -> dict[str, ChangeFactors]:
        """By module name, sorted, float32 at least."""
        found = {}
        for name, layer in adapted_layers(self.network).items():
            change = change_of(layer, self._weights.get(name))
            if name in self._start:
                dense = change.up if change.down is None else change.up @ change.down
                change = ChangeFactors(dense - self._start[name])
            found[name] = ChangeFactors(_wide(change.up), None if change.down is None else _wide(change.down))
        return found

    @torch.no_grad()
    def _dense(self) -> dict[str, Tensor]:
        found = {}
        for name, layer in adapted_layers(self.network).items():
            with torch.enable_grad():  # some adapters are asked whether they have gradients
                change = change_of(layer, self._weights.get(name))
            found[name] = (change.up if change.down is None else change.up @ change.down).detach()
        return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
