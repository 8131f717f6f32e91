"""LoRA on a model: attach a new one to the denoiser for training, switch it off for a reference pass, load finished ones, with
weights, onto denoiser and text encoders.

All through diffusers and peft, so the layers are peft's own. The autoencoder is never adapted.
"""

import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers, set_weights_and_activate_adapters
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from valign.checks import UserError, check_range
from valign.models.diffusion.adapter_base import check_base
from valign.models.diffusion.base import DiffusionModel
from valign.models.files.adapter_files import AdapterFile, lora_config, open_adapter
from valign.models.files.finite import check_finite
from valign.models.files.layouts import full_name

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # every attention's projections, self and cross (AlignGuard, arXiv 2412.10493)
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")  # the same of a text encoder, as diffusers' own trainers adapt it
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "conv")  # of residual blocks, and of what halves and doubles images


def attach_lora(
    model: DiffusionModel,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = ATTENTION,
    name: str = "expert",
    seed: int = 0,
) -> list[str]:
    """Add a new LoRA to the denoiser, the only thing that is trainable afterwards; return the adapted modules, sorted.

    ``A ~ N(0, (1/rank)^2)``, ``B = 0``, both float32, so the model's function is unchanged. ``A`` depends on ``seed``, the module's
    name and its shape alone: experts attached with one seed share it.

    Args:
        rank: 1 or more.
        alpha: The change of weight is ``alpha / rank * B A``; ``rank`` when not given.
        targets: Endings of module names.
    Raises: ValueError if adapters are loaded or attached already, or nothing has one of the ``targets``.
    """
    check_range("attach_lora.rank", float(rank), low=1.0)
    check_range("attach_lora.alpha", float(rank) if alpha is None else alpha, above=0.0)
    return add_lora(bare_denoiser(model), rank=rank, alpha=alpha, targets=targets, name=name, seed=seed)


def bare_denoiser(model: DiffusionModel) -> Any:
    """The denoiser, frozen. Raises: ValueError if adapters are loaded or attached."""
    if names := adapter_names(model):
        raise ValueError(f"A new adapter needs a bare denoiser, got one with {', '.join(names)}. Call unload_adapters first.")
    model.pool.need("denoiser")
    return model.denoiser.requires_grad_(False)


def adaptable(model: DiffusionModel) -> dict[str, nn.Module]:
    """The networks that adapters may change, by the prefix of their modules' names in `AdapterFile.modules`: "" of the denoiser."""
    parts = (part for part in model.components if part != "denoiser")
    return {"": model.denoiser, **{model.components[part]: getattr(model.pipe, part) for part in parts}}


def adapter_names(model: DiffusionModel) -> list[str]:
    """Names of the adapters on the model, loaded or attached, in the order they came."""
    return list(dict.fromkeys(name for network in adaptable(model).values() for name in getattr(network, "peft_config", {})))


def add_lora(
    denoiser: Any, *, rank: int, alpha: float | None = None, targets: Sequence[str] = ATTENTION, name: str = "expert", seed: int = 0
) -> list[str]:
    """`attach_lora` on a bare denoiser of diffusers, or a text encoder of transformers; on the meta device without values."""
    if not any(f".{module}".endswith(f".{target}") for module, _ in denoiser.named_modules() for target in targets):
        raise ValueError(
            f"attach_lora.targets must name modules of the denoiser, got {', '.join(targets)}. Try {', '.join(ATTENTION)}."
        )
    scale = {"r": rank, "lora_alpha": rank if alpha is None else alpha}
    _inject(denoiser, LoraConfig(**scale, target_modules=list(targets), init_lora_weights=True), name)  # type: ignore[arg-type]
    layers = adapted(denoiser, name)
    for module, layer in layers.items():
        down, up = layer.lora_A[name], layer.lora_B[name]
        down.float(), up.float()
        if not down.weight.is_meta:
            generator = torch.Generator().manual_seed(_module_seed(seed, module))
            with torch.no_grad():
                down.weight.copy_(torch.randn(down.weight.shape, generator=generator) / rank)
                up.weight.zero_()
    return sorted(layers)


def _inject(network: Any, config: LoraConfig, name: str) -> None:
    """What ``add_adapter`` of diffusers and transformers does; the latter asks for a later peft than it needs."""
    network._hf_peft_config_loaded = True
    inject_adapter_in_model(config, network, name)


def adapted(network: nn.Module, name: str) -> dict[str, Any]:
    """Module name -> peft layer, for every module that has an adapter called ``name``."""
    return {module: layer for module, layer in network.named_modules() if isinstance(layer, LoraLayer) and name in layer.lora_A}


@contextmanager
def adapter_off(model: DiffusionModel) -> Iterator[None]:
    """Run the base model inside the block, exactly; afterwards every adapter is on (or off) and trainable (or not) as before.

    Raises: ValueError if there is no adapter: the block would be the same model, not a reference.
    """
    modules = (layer for network in adaptable(model).values() for layer in network.modules())
    layers: list[Any] = [layer for layer in modules if isinstance(layer, LoraLayer)]
    if not layers:
        raise ValueError("adapter_off needs a model with an adapter, got none to switch off. Attach or load one first.")
    before = [(layer, layer.disable_adapters, [(p, p.requires_grad) for p in layer.parameters()]) for layer in layers]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, was_off, trainable in before:
            layer.enable_adapters(not was_off)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)


def load_adapter(model: DiffusionModel, folder: str | Path, *, name: str, weight: float = 1.0, anyway: bool = False) -> None:
    """Add a saved adapter to the model, frozen and in its dtype, beside those loaded before; their changes add up.

    Args:
        folder: A folder that `valign.models.files.adapter_files.open_adapter` reads.
        name: A name of your choice, not used yet.
        weight: Factor on the adapter's change of weight; 0 switches it off, negative turns it round.
        anyway: Also load an adapter whose record names another model.
    Raises: UserError if the adapter does not fit this model, or was made for another; the model is then as before.
    """
    check_range("load_adapter.weight", weight)
    if not re.fullmatch(r"[\w-]+", name) or name in adapter_names(model):
        raise UserError(f"load_adapter.name must be a new name of letters, digits, - and _, got {name!r}. Choose another name.")
    networks = adaptable(model)
    if any(parameter.requires_grad for network in networks.values() for parameter in network.parameters()):
        raise ValueError("load_adapter needs a frozen model, got one in training. Call unload_adapters first.")
    file = open_adapter(Path(folder))
    ranks = _check_fit(model, file)
    check_base(model, file, anyway=anyway)
    weights = {**adapter_weights(model), name: weight}
    with model.pool.together():
        for prefix in ranks:
            model.pool.need("text" if prefix else "denoiser")
            _load_part(model, prefix, ranks[prefix], file, name)
            network: Any = networks[prefix]
            there = {one: weights[one] for one in network.peft_config}
            set_weights_and_activate_adapters(network, list(there), list(there.values()))
            network.requires_grad_(False)


def _load_part(model: DiffusionModel, prefix: str, ranks: dict[str, int], file: AdapterFile, name: str) -> None:
    """The factors of one network's modules, named as in that network."""
    network: Any = adaptable(model)[prefix]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are what is wanted
        _inject(network, LoraConfig(**lora_config(ranks)), name)
    for module, layer in adapted(network, name).items():
        full = full_name(prefix, module)
        factors = file.factors(full).folded()
        for matrix, values in ((layer.lora_A[name], factors.down), (layer.lora_B[name], factors.up)):
            matrix.to(model.dtype)
            with torch.no_grad():
                matrix.weight.copy_(values.view_as(matrix.weight))
            check_finite(f"{file.tensors.path} in {model.dtype}", {full: matrix.weight})


def adapter_weights(model: DiffusionModel) -> dict[str, float]:
    """Names of the adapters on the model, in the order they came, with their scales: the weights given to `load_adapter`."""
    networks = adaptable(model).values()
    layers = {name: next(layer for one in networks for layer in adapted(one, name).values()) for name in adapter_names(model)}
    return {name: layer.scaling[name] for name, layer in layers.items()}


def unload_adapters(model: DiffusionModel) -> None:
    """Take every adapter off, loaded or attached; the model is the base model again, bit for bit."""
    network: Any
    for network in adaptable(model).values():
        recurse_remove_peft_layers(network)
        if hasattr(network, "peft_config"):
            del network.peft_config
            network._hf_peft_config_loaded = False  # what diffusers and transformers ask


def _check_fit(model: DiffusionModel, file: AdapterFile) -> dict[str, dict[str, int]]:
    """Rank of each module of ``file``, by the prefix and the name in its network, after a look that the model has them all, with
    these shapes."""
    shapes, names = {}, {}
    for prefix, network in adaptable(model).items():
        for module, layer in network.named_modules():
            base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
            if isinstance(base, nn.Linear) or (isinstance(base, nn.Conv2d) and base.groups == 1):
                full = full_name(prefix, module)
                names[full], shapes[full] = (prefix, module), (len(base.weight), base.weight[0].numel())
    missing = [module for module in file.modules if module not in names]
    if missing:
        raise UserError(
            f"{file.folder} must fit the model, got {len(missing)} of {len(file.modules)} modules that it does not have, "
            f"such as {missing[0]}. Use the architecture that the adapter was trained on."
        )
    ranks: dict[str, dict[str, int]] = {}
    for module, factors in file.items():
        if factors.shape != shapes[module]:
            raise UserError(
                f"{file.folder} must fit the model, got {module} of {factors.shape} where the model has {shapes[module]}. "
                "Use the architecture that the adapter was trained on."
            )
        prefix, inner = names[module]
        ranks.setdefault(prefix, {})[inner] = factors.rank
    return ranks


def _module_seed(seed: int, module: str) -> int:
    """A 63-bit seed of its own for each module name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{module}".encode()).digest()[:8]) >> 1
