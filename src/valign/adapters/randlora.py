"""RandLoRA: full-rank changes from scaled random bases (Albert et al., arXiv 2502.00987), by peft, set up as in the paper.

peft scales by ``alpha / r`` and defaults to 20 whatever the layer; the paper by ``2 / sqrt(n)`` with n bases per weight.
"""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import RandLoraConfig
from peft.tuners.randlora.layer import RandLoraLayer
from torch import nn

from valign.adapters.base import AdapterHandle, AdapterOptions, AttachContext, attach_peft
from valign.adapters.tuner_layer import TunerLayer, target_names
from valign.checks import check_range
from valign.methods import Method

METHOD = Method(
    slug="randlora",
    title="RandLoRA: full-rank changes from scaled random bases",
    paper="arXiv 2502.00987",
    room="adapters",
    entry="valign.adapters.randlora:randlora_config",
    fidelity="exact",
    note="peft's tuner at the paper's scale; bases are paired in another order than in the formula, with the same distribution",
)

PAPER_SCALE = 2.0  # of the change of weight, before 1 / sqrt(n): the paper's language models


def randlora_config(
    model: nn.Module, *, target_modules: Sequence[str], r: int | None = None, like_lora: int | None = None, **options: Any
) -> RandLoraConfig:
    """peft's config with the paper's scale, ``randlora_alpha = 2 r / sqrt(ceil(d / r))``, for the linears of ``model``.

    d is a weight's smaller side, D its larger; with several sizes the commonest counts, because peft has one rank and one alpha.

    Args:
        target_modules: Endings of module names; linear layers and transformers' Conv1D.
        r: Rank of each basis, 1 or more; a smaller one trains more. 32 if neither this nor ``like_lora`` is given.
        like_lora: Choose r so that about as much is trained as with a LoRA of this rank.
        options: More fields of `RandLoraConfig`, such as ``randlora_alpha`` for another scale, ``sparse`` or ``save_projection``.
            With ``save_projection=False`` a file is small, but the bases are drawn again in the machine's default half precision:
            load it on a machine of the same kind.
    Raises: ValueError if r and like_lora are both given, one is below 1, sparse and very_sparse are both set, nothing (or something
        other than a linear layer) has one of the targets, or the model has a RandLoRA adapter already that does not share r,
        projection_prng_key and save_projection.
    """
    if r is not None and like_lora is not None:
        raise ValueError(f"randlora_config must have r or like_lora, got both r={r} and like_lora={like_lora}.")
    if options.get("sparse") and options.get("very_sparse"):
        raise ValueError("randlora_config must have sparse or very_sparse, got both. peft would silently take very_sparse.")
    longer, shorter = Counter(linear_sizes(model, target_modules)).most_common(1)[0][0]
    if like_lora is not None:
        r = rank_like_lora(longer, shorter, like_lora)
    r = 32 if r is None else r
    check_range("randlora_config.r", r, low=1)
    if r > shorter:
        warnings.warn(
            f"randlora_config.r is {r}, above the smaller side {shorter} of most weights: one basis is left.", stacklevel=2
        )
    options.setdefault("randlora_alpha", paper_alpha(shorter, r))
    config = RandLoraConfig(r=r, target_modules=list(target_modules), **options)
    for name, other in getattr(model, "peft_config", {}).items():
        if isinstance(other, RandLoraConfig):
            for field in ("r", "projection_prng_key", "save_projection"):
                if getattr(other, field) != getattr(config, field):
                    raise ValueError(
                        f"randlora_config.{field} must be {getattr(other, field)!r}, as adapter {name!r} of this model has it, "
                        f"got {getattr(config, field)!r}. Adapters of one model share their bases."
                    )
    return config


def linear_sizes(model: nn.Module, target_modules: Sequence[str]) -> list[tuple[int, int]]:
    """(longer, shorter side) of every targeted weight.

    Raises: ValueError if a target is not a linear layer, or there is none.
    """
    sizes = []
    for name, module in model.named_modules():
        if any(f".{name}".endswith(f".{target}") for target in target_modules):
            base = module.get_base_layer() if isinstance(module, RandLoraLayer) else module
            try:
                TunerLayer.check(base, name, None)
            except TypeError as error:
                raise ValueError(f"randlora_config.{error}") from None
            longer, shorter = sorted(TunerLayer.matrix_shape(base), reverse=True)
            sizes.append((longer, shorter))
    if not sizes:
        raise ValueError(
            f"randlora_config.target_modules must name modules of the model, got {target_modules!r}. "
            f"It can name {target_names(model, TunerLayer, None)}."
        )
    return sizes


def paper_alpha(shorter: int, r: int, scale: float = PAPER_SCALE) -> float:
    """peft's alpha for which a change of weight is scaled by ``scale / sqrt(n)``, ``n = ceil(shorter / r)``."""
    return scale * r / math.sqrt(math.ceil(shorter / r))


def trained_numbers(shorter: int, r: int) -> int:
    """Per weight: ``n (r + d)`` with ``n = ceil(d / r)``."""
    return math.ceil(shorter / r) * (r + shorter)


def rank_like_lora(longer: int, shorter: int, lora_rank: int) -> int:
    """The r for which RandLoRA trains about ``lora_rank (longer + shorter)`` numbers: ``d^2 / (q (D + d) - d)``, at least 1."""
    check_range("rank_like_lora.lora_rank", lora_rank, low=1)
    return max(1, round(shorter**2 / (lora_rank * (longer + shorter) - shorter)))


def set_randlora_scale(model: nn.Module, adapter: str, weight: float) -> None:
    """Weaken (or strengthen) an adapter: peft's layer lacks the method that diffusers' `set_adapters` calls with a weight.

    Args:
        weight: Factor on the trained change; 1 is as trained, 0 is off. Not relative to an earlier call.
    Raises: ValueError if the model has no such RandLoRA adapter, or the weight is not finite.
    """
    check_range("set_randlora_scale.weight", weight)
    layers = [layer for layer in model.modules() if isinstance(layer, RandLoraLayer) and adapter in layer.scaling]
    config = getattr(model, "peft_config", {}).get(adapter)
    if not layers or config is None:
        raise ValueError(f"set_randlora_scale.model must have a RandLoRA adapter called {adapter!r}, got none.")
    for layer in layers:
        layer.scaling[adapter] = weight * config.randlora_alpha / layer.r[adapter]


@dataclass(frozen=True, kw_only=True)
class RandLoraOptions(AdapterOptions):
    """peft's RandLoRA at the paper's scale, as an adapter."""

    like_lora: int = 8  # trains about as much as a LoRA of this rank
    learning_rate: float = 1e-3

    def attach(self, context: AttachContext) -> AdapterHandle:
        key = context.generator("bases").initial_seed() % 2**31
        config = randlora_config(context.network, target_modules=context.targets, like_lora=self.like_lora, projection_prng_key=key)
        return AdapterHandle(attach_peft(context, config))
