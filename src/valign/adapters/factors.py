"""What the LoRA methods share: their layers, extra tensors beside peft's own, a variant that is its factors, and export.

A method here is peft's LoRA with another reading of its tensors: a `FactorVariant` says which ``down`` and ``up`` they stand
for, and forward, merging, unmerging and the export to plain LoRA follow from that.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from valign.checks import UserError
from valign.files import atomic_folder
from valign.models.files.adapter_files import LoraFactors, lora_config
from valign.models.files.adapter_index import PEFT_WEIGHTS

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
START = ("lora_start_A", "lora_start_B")  # factors that were taken out of the base weight, or are taken off in the forward pass


class FactorVariant(LoraVariant):
    """A LoRA whose change of weight is ``scale * up @ down`` of `factors`; `plain` is peft's own reading."""

    def factors(self, layer: Any, name: str) -> LoraFactors:
        """The factors of adapter ``name`` as they stand, with gradients to what is trained."""
        return plain(layer, name)

    def exported(self, layer: Any, name: str) -> LoraFactors:
        """What `export_lora` writes; the same change of weight as `factors`."""
        return self.factors(layer, name)

    def supports_lora_conversion(self) -> bool:
        """False: peft's own conversion would read the bare tensors. `export_lora` converts exactly."""
        return False

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        lora = self.factors(module, active_adapter)
        hidden = linear(module.lora_dropout[active_adapter](x), lora.down)
        up = (lora.up * lora.scale).T  # scaled here, not token by token
        dtype = torch.promote_types(result.dtype, hidden.dtype)  # as a sum of the two has it
        return torch.addmm(_rows(result).to(dtype), _rows(hidden).to(dtype), up.to(dtype)).view(result.shape)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        return orig_weight + self._delta(module, active_adapter, orig_weight)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        orig_weight.data += self._delta(module, active_adapter, orig_weight)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        return orig_weight.data - self._delta(module, active_adapter, orig_weight)

    @torch.no_grad()
    def _delta(self, layer: Any, name: str, like: Tensor) -> Tensor:
        delta = self.factors(layer, name).delta()
        return (delta.T if layer.fan_in_fan_out else delta).to(like.dtype)


def _rows(tokens: Float[Tensor, "... size"]) -> Float[Tensor, "token size"]:
    return tokens.reshape(-1, tokens.shape[-1])


def plain(layer: Any, name: str) -> LoraFactors:
    """``scaling * B @ A``, of a convolution laid flat."""
    down, up, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])
    if down.ndim == 2:
        return LoraFactors(down, up, scale)
    return LoraFactors(down.flatten(1), up.flatten(1), scale, (down.shape[2], down.shape[3]))


def against_start(layer: Any, name: str) -> LoraFactors:
    """``scaling * (B @ A - B0 @ A0)`` as factors of twice the rank: the exact change on the base weight as it was."""
    now, (down, up) = plain(layer, name), (getattr(layer, part)[name] for part in START)
    return LoraFactors(torch.cat([now.down, down]), torch.cat([now.up, -up], dim=1), now.scale)


def lora_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """Module name, without peft's prefix -> LoRA layer that has ``adapter``, sorted by name."""
    found = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and (adapter in layer.lora_A or adapter in layer.lora_embedding_A)
    }
    return dict(sorted(found.items()))


def only_adapter(model: nn.Module, adapter: str | None) -> str:
    """``adapter``, or the name of the one that the model has.

    Raises: UserError if the model has none, several, or not this one.
    """
    names = list(getattr(model, "peft_config", {}))
    if adapter is None and len(names) == 1:
        return str(names[0])
    if adapter is None or adapter not in names:
        has = ", ".join(names) or "none"
        raise UserError(
            f"adapter must be the name of a LoRA on the model, got {adapter!r}; the model has {has}. Attach one with peft."
        )
    return adapter


def fresh_linears(model: nn.Module, adapter: str, method: str, *, rewrites_base: bool = False) -> dict[str, Any]:
    """The linear layers of a LoRA that was neither initialized by a method nor trained, by name.

    Raises: UserError if the adapter has no layer; TypeError for quantized weights; ValueError for another method's adapter (DoRA,
        PiSSA, this one a second time, a trained one), layers that are not linear, base weights that are not the model's own (merged
        adapters, AILoRA's residual) or not finite, ranks above a layer's size, and, with ``rewrites_base``, for tied weights.
    """
    layers = lora_layers(model, adapter)
    if not layers:
        raise UserError(f"{method}.adapter must be a LoRA, got {adapter!r} without a LoRA layer. Check its target_modules.")
    start = model.peft_config[adapter].init_lora_weights  # type: ignore[union-attr, index]
    if start is not True:
        raise ValueError(f"{method} must start from init_lora_weights=True, got {start!r}. Leave the start to one method.")
    for name, layer in layers.items():
        _check_layer(name, layer, adapter, method)
    if rewrites_base:
        _check_tied(model, layers, method)
    return layers


def _check_layer(name: str, layer: Any, adapter: str, method: str) -> None:
    base = layer.get_base_layer()
    if adapter in layer.lora_variant or adapter in getattr(layer, "lora_method", {}):
        other = getattr(layer, "lora_method", {}).get(adapter, type(layer.lora_variant.get(adapter)).__name__)
        raise ValueError(f"{method} must start from a plain new LoRA, got {name} which is {other} already. Attach a new adapter.")
    linear_down = adapter in layer.lora_A and isinstance(layer.lora_A[adapter], nn.Linear)
    if not linear_down or not hasattr(base, "weight"):  # nn.MultiheadAttention has linear factors on a fused weight
        raise ValueError(
            f"{method} must have linear layers only, got {name}, a {type(base).__name__}. "
            "Leave it out of target_modules, or unfuse it if it is attention."
        )
    if layer.merged:
        raise ValueError(
            f"{method} must read the base weight, got {name} with {', '.join(layer.merged_adapters)} merged. "
            "Call unmerge_adapter first."
        )
    for other in getattr(layer, START[0], {}):
        if other not in layer.lora_variant:
            raise ValueError(
                f"{method} must read the base weight, got {name} which holds the residual of adapter {other!r}. "
                "Load the base model again, or start that adapter with preserve_base."
            )
    weight = base.weight
    if weight.dtype not in FLOATS:
        raise TypeError(f"{method} must read float weights, got {name} in {weight.dtype}. Initialize before quantizing.")
    if weight.is_meta or layer.lora_A[adapter].weight.is_meta:
        return
    if not weight.isfinite().all():
        raise ValueError(f"{method} must have finite weights, got NaN or infinity in {name}. Load the base model again.")
    if layer.lora_B[adapter].weight.any():
        raise ValueError(f"{method} must start from a new LoRA, got {name} which is trained. Attach a new adapter.")
    if layer.r[adapter] > min(layer.in_features, layer.out_features):
        size = (layer.out_features, layer.in_features)
        raise ValueError(f"{method}.rank must be in [1, {min(size)}] for {name}, got {layer.r[adapter]}. The weight is {size}.")


def _check_tied(model: nn.Module, layers: Mapping[str, Any], method: str) -> None:
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    for name, layer in layers.items():
        if len(owners[id(layer.get_base_layer().weight)]) > 1:
            raise ValueError(
                f"{method} must have weights of its own, got {name}, which is tied to another module. Untie them first."
            )


def weight_of(layer: Any) -> Float[Tensor, "fan_out fan_in"]:
    """The base weight as a linear layer has it, float32 at least (transformers' Conv1D keeps the transpose)."""
    weight = layer.get_base_layer().weight.detach()
    weight = weight.T if layer.fan_in_fan_out else weight
    return weight if weight.dtype == torch.float64 else weight.float()


@torch.no_grad()
def write_weight(layer: Any, weight: Float[Tensor, "fan_out fan_in"]) -> None:
    """Replace the base weight, in its own dtype and orientation."""
    layer.get_base_layer().weight.copy_(weight.T if layer.fan_in_fan_out else weight)


@torch.no_grad()
def write_factors(layer: Any, name: str, *, down: Float[Tensor, "rank fan_in"], up: Float[Tensor, "fan_out rank"]) -> None:
    """Overwrite peft's A and B in place."""
    layer.lora_A[name].weight.copy_(down)
    layer.lora_B[name].weight.copy_(up)


def mark(layer: Any, name: str, method: str) -> None:
    """Note that ``method`` owns this adapter, so that no other initializer takes it; peft forgets it with the adapter."""
    if not hasattr(layer, "lora_method"):
        layer.lora_method = {}
        layer.other_param_names = (*layer.other_param_names, "lora_method")
    layer.lora_method[name] = method


def add_parameter(layer: Any, attribute: str, name: str, value: Tensor) -> nn.Parameter:
    """A trainable tensor beside A and B that peft then saves, freezes, switches and deletes with them."""
    if not hasattr(layer, attribute):
        setattr(layer, attribute, nn.ParameterDict())
        layer.adapter_layer_names = (*layer.adapter_layer_names, attribute)
    parameter = nn.Parameter(value)
    getattr(layer, attribute)[name] = parameter
    return parameter


def add_buffer(layer: Any, attribute: str, name: str, value: Tensor, *, saved: bool = True) -> None:
    """A constant tensor beside A and B; ``saved`` says whether state dicts hold it."""
    if not hasattr(layer, attribute):
        setattr(layer, attribute, BufferDict(persistent=saved))
        layer.other_param_names = (*layer.other_param_names, attribute)
    getattr(layer, attribute)[name] = value


def adapter_state(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Every tensor that the adapter holds, trained or not, by its name in the model; no copies, so writing into them restores."""
    return {
        f"{module}.{key}": value
        for module, layer in _sorted_layers(model)
        for key, value in layer.state_dict(keep_vars=True).items()
        if not key.startswith("base_layer.") and adapter in key.split(".")
    }


def _sorted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return sorted((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))


@torch.no_grad()
def factors_of(layer: Any, name: str) -> LoraFactors:
    """The exact change of the base weight *as it was before the method*, whatever the method, as plain factors, detached."""
    variant = layer.lora_variant.get(name)
    if isinstance(variant, FactorVariant):
        lora = variant.exported(layer, name)
    elif variant is not None:
        raise ValueError(
            f"export_lora must have plain LoRA or a method of valign, got {type(variant).__name__}. Use peft's own export."
        )
    elif name in getattr(layer, START[0], {}):
        lora = against_start(layer, name)
    else:
        lora = plain(layer, name)
    return replace(lora, down=lora.down.detach().clone(), up=lora.up.detach().clone())


def export_lora(model: nn.Module, adapter: str | None = None) -> dict[str, LoraFactors]:
    """The adapter as plain LoRA on the original base model, exact, by module name; `save_adapter` and `save_peft_lora` write it.

    Modules whose rank fell to 0 are left out. If none is left, one has a single zero component: an adapter that does nothing.
    Raises: UserError without a LoRA of that name; ValueError for peft's own variants, such as DoRA.
    """
    adapter = only_adapter(model, adapter)
    found = {module: factors_of(layer, adapter) for module, layer in lora_layers(model, adapter).items()}
    kept = {module: lora for module, lora in found.items() if lora.rank}
    if not kept and found:
        module, lora = next(iter(found.items()))
        kept[module] = replace(lora, down=lora.down.new_zeros(1, lora.shape[1]), up=lora.up.new_zeros(lora.shape[0], 1), scale=1.0)
    return kept


def save_for_any_base(model: nn.Module, adapter: str) -> None:
    """Let ``save_pretrained`` write ``adapter`` as plain LoRA for the original base weights, which its own tensors do not fit.

    Called by every method that takes its start out of the base weights. A model without peft's ``save_pretrained`` (one of
    transformers or diffusers with ``add_adapter``) is warned of: `export_lora` gives its factors.
    """
    if not isinstance(model, PeftModel):
        warnings.warn(
            f"Adapter {adapter!r} changed the base weights: what the model itself saves fits these alone. Save what "
            "valign.adapters.export_lora gives instead, by save_peft_lora or save_adapter.",
            stacklevel=4,
        )
        return
    model.save_pretrained = MethodType(_save_exactly, model)  # type: ignore[method-assign]  # of this model, and of its copies


def _save_exactly(model: Any, save_directory: str | Path, **options: Any) -> None:
    """`PeftModel.save_pretrained`, and then the files of adapters that changed the base weights once more, as plain LoRA."""
    options.pop("path_initial_model_for_weight_conversion", None)  # peft's own way to the same file
    type(model).save_pretrained(model, str(save_directory), **options)
    for adapter in options.get("selected_adapters") or list(model.peft_config):
        if not any(adapter in getattr(layer, START[0], {}) for layer in lora_layers(model, adapter).values()):
            continue
        folder = Path(save_directory) / ("" if adapter == "default" else adapter)
        base = model.peft_config[adapter].base_model_name_or_path or ""
        with TemporaryDirectory(dir=save_directory) as temporary:
            made = save_peft_lora(Path(temporary) / "lora", export_lora(model, adapter), base=base)
            for file in made.iterdir():
                file.replace(folder / file.name)


def save_peft_lora(folder: Path, factors: Mapping[str, LoraFactors], *, base: str = "") -> Path:
    """Write factors as a peft folder of plain LoRA (scale 1, ranks per module), which ``PeftModel.from_pretrained`` reads.

    Raises: UserError if the folder exists.
    """
    with atomic_folder(Path(folder)) as temporary:
        ranks = {module: lora.rank for module, lora in factors.items()}
        LoraConfig(**lora_config(ranks), base_model_name_or_path=base or None, inference_mode=True).save_pretrained(str(temporary))
        save_file(dict(_peft_tensors(factors)), temporary / PEFT_WEIGHTS, metadata={"format": "pt"})
    return Path(folder)


def _peft_tensors(factors: Mapping[str, LoraFactors]) -> Iterator[tuple[str, Tensor]]:
    for module, lora in sorted(factors.items()):
        down, up = lora.folded().as_saved(torch.float32)
        yield f"base_model.model.{module}.lora_A.weight", down.cpu().contiguous()
        yield f"base_model.model.{module}.lora_B.weight", up.cpu().contiguous()
