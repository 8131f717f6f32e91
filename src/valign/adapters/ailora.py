"""Start the query's LoRA on principal and the value's on minor singular directions (AILoRA, arXiv 2510.08034)."""

import re
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from valign.adapters.base import AdapterHandle, AttachContext, InitReport, LoraHandle, LowRankOptions
from valign.adapters.factors import (
    START,
    FactorVariant,
    LoraFactors,
    add_buffer,
    against_start,
    fresh_linears,
    mark,
    only_adapter,
    save_for_any_base,
    weight_of,
    write_factors,
    write_weight,
)
from valign.adapters.spectrum import Spectrum, exact_svd, randomized_svd
from valign.checks import check_choice, check_range
from valign.methods import Method

METHOD = Method(
    slug="ailora",
    title="AILoRA: principal directions for queries, minor ones for values",
    paper="arXiv 2510.08034",
    room="adapters",
    entry="valign.adapters.ailora:AILoRA",
    fidelity="variant",
    note="the paper's body was not at hand: the principal half follows public summaries, the minor half MiLoRA, the "
    "division by the scale PiSSA",
)

Part = Literal["principal", "minor"]
FUSED = ("qkv", "to_qkv", "to_added_qkv", "qkv_proj", "c_attn", "query_key_value", "in_proj_weight", "in_proj", "Wqkv")
DEAD = 1e-6  # singular values below this share of the largest count as zero


class SplitStart(NamedTuple):
    """``weight == residual + scale * up @ down``."""

    down: Float[Tensor, "rank fan_in"]
    up: Float[Tensor, "fan_out rank"]


def split_start(spectrum: Spectrum, rank: int, *, part: Part, scale: float = 1.0, module: str = "the weight") -> SplitStart:
    """Factors of ``rank`` singular triplets: ``up = u sqrt(s / scale)``, ``down = sqrt(s / scale) vh``, so the two are balanced.

    ``"principal"`` takes the largest singular values (PiSSA, arXiv 2404.02948), ``"minor"`` the smallest (MiLoRA, arXiv 2406.09044)
    that are above 1e-6 of the largest: a zero one would leave both factors dead. The product does not depend on ``scale``.

    Args:
        spectrum: Descending; all triplets for ``"minor"``.
        scale: LoRA's ``alpha / rank``, > 0.
        module: What a message calls the weight.
    Raises: ValueError if fewer than ``rank`` singular values are above the limit.
    """
    check_choice("split_start.part", part, ("principal", "minor"))
    check_range("split_start.scale", scale, above=0)
    check_range("split_start.rank", rank, low=1, high=len(spectrum.s))
    alive = int((spectrum.s > DEAD * spectrum.s[0]).sum())
    if part == "minor" and alive < len(spectrum.s):
        if alive < rank:
            raise ValueError(f"split_start.rank must be in [1, {alive}], {module}'s own rank, got {rank}. Lower the rank.")
        dead = len(spectrum.s) - alive
        warnings.warn(f"Of {module}, {dead} singular values are zero; the smallest above zero are taken.", stacklevel=2)
    keep = slice(0, rank) if part == "principal" else slice(alive - rank, alive)
    root = (spectrum.s[keep] / scale).sqrt()
    return SplitStart(down=root[:, None] * spectrum.vh[keep], up=spectrum.u[:, keep] * root)


class StartTakenOff(FactorVariant):
    """The forward pass takes the frozen start off again, so the base weight stays as it is: ``W x + s (B A - B0 A0) x``."""

    def factors(self, layer: Any, name: str) -> LoraFactors:
        return against_start(layer, name)


@dataclass(frozen=True, kw_only=True)
class AILoRA:
    """Per attention: ``W_Q`` starts from its ``r`` largest singular triplets, ``W_V`` from its ``r`` smallest; both factors train.

    ``W = U diag(S) V^T``; with the chosen triplets, ``B = U sqrt(S / s)``, ``A = sqrt(S / s) V^T``, and the frozen weight becomes
    the residual ``W - s B A``, so that the function is unchanged (``s = alpha / r``, or ``alpha / sqrt(r)``). Other targets keep
    LoRA's start. The paper's body was not at hand: the query's formula, the frozen residual and the minor half follow public
    summaries and MiLoRA's code; the division by ``s`` is PiSSA's.

    Calling it returns an `InitReport` and changes the model in place.
    Raises: ValueError if no module is a query or none a value (``allow_one_sided`` permits it), for fused projections, and as
        `fresh_linears` says.
    """

    query: str = r"to_q|q_proj|query|q|add_q_proj|q_lin|wq"  # regular expression for a module's last name
    value: str = r"to_v|v_proj|value|v|add_v_proj|v_lin|wv"
    part_query: Part = "principal"
    part_value: Part = "minor"
    preserve_base: bool = (
        False  # leave the base weight alone and take the start off in the forward pass: twice LoRA's small matmuls
    )
    allow_one_sided: bool = False
    niter: int | None = None  # None: exact SVD; else rounds of a randomized one for principal parts (minor ones stay exact)
    oversample: int = 8  # extra columns of the randomized SVD
    generator: torch.Generator | None = None  # of the randomized SVD

    def __post_init__(self) -> None:
        for name in ("query", "value"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ValueError(f"AILoRA.{name} must be a regular expression, got {getattr(self, name)!r}: {error}.") from error
            check_choice(f"AILoRA.part_{name}", getattr(self, f"part_{name}"), ("principal", "minor"))
        check_range("AILoRA.oversample", self.oversample, low=0)
        if self.niter is not None:
            check_range("AILoRA.niter", self.niter, low=0)
            if self.generator is None:
                raise ValueError("AILoRA.generator must be given with niter, got None. A randomized SVD draws from it.")

    def role(self, module: str) -> Part | None:
        """What the module starts from; None is LoRA's own start."""
        last = module.rpartition(".")[2]
        if re.fullmatch(self.query, last):
            return self.part_query
        return self.part_value if re.fullmatch(self.value, last) else None

    def __call__(self, model: nn.Module, adapter: str | None = None) -> InitReport:
        adapter = only_adapter(model, adapter)
        layers = fresh_linears(model, adapter, "AILoRA", rewrites_base=not self.preserve_base)
        self._check(list(layers))
        skipped = tuple(name for name, layer in layers.items() if layer.lora_A[adapter].weight.is_meta)
        # every decomposition before the first change: an error leaves the model as it was
        starts = {
            name: self._start(name, layer, adapter) for name, layer in layers.items() if name not in skipped and self.role(name)
        }
        for name, start in starts.items():
            layer = layers[name]
            write_factors(layer, adapter, down=start.down, up=start.up)
            down, up = (matrix[adapter].weight.detach().clone() for matrix in (layer.lora_A, layer.lora_B))
            for attribute, value in zip(START, (down, up), strict=True):
                add_buffer(layer, attribute, adapter, value)
            mark(layer, adapter, "AILoRA")
            if self.preserve_base:
                layer.lora_variant[adapter] = StartTakenOff()
            else:
                product = up.to(start.up.dtype) @ down.to(start.up.dtype)
                write_weight(layer, weight_of(layer) - layer.scaling[adapter] * product)
        if not self.preserve_base:
            save_for_any_base(model, adapter)
        return InitReport(
            method="ailora",
            adapter=adapter,
            roles={name: self.role(name) or "lora" for name in layers if name not in skipped},
            trainable=sum(p.numel() for layer in layers.values() for p in layer.parameters() if p.requires_grad),
            keeps_function=True,
            keeps_base=self.preserve_base,
            skipped=skipped,
        )

    def _start(self, name: str, layer: Any, adapter: str) -> SplitStart:
        part, rank = self.role(name), layer.r[adapter]
        assert part is not None
        if part == "principal" and self.niter is not None:
            assert self.generator is not None
            found = randomized_svd(weight_of(layer), rank, niter=self.niter, oversample=self.oversample, generator=self.generator)
        else:
            found = exact_svd(weight_of(layer))
        return split_start(found, rank, part=part, scale=layer.scaling[adapter], module=name)

    def _check(self, modules: list[str]) -> None:
        fused = [name for name in modules if name.rpartition(".")[2] in FUSED]
        if fused:
            raise ValueError(
                f"AILoRA must tell queries from values, got {fused[0]}, which holds both. Unfuse the projections first."
            )
        for name in ("query", "value"):
            pattern = getattr(self, name)
            if not self.allow_one_sided and not any(re.fullmatch(pattern, module.rpartition(".")[2]) for module in modules):
                ends = sorted({module.rpartition(".")[2] for module in modules})
                raise ValueError(
                    f"AILoRA.{name} must match a module, got {pattern!r} for modules called {', '.join(ends)}. "
                    "Target both, name yours, or set allow_one_sided."
                )


@dataclass(frozen=True, kw_only=True)
class AILoRAOptions(LowRankOptions):
    """`AILoRA` as an adapter; for an expert the base weights stay as they are."""

    expert: ClassVar[bool] = True

    def attach(self, context: AttachContext) -> AdapterHandle:
        network = self.new_lora(context)
        AILoRA(preserve_base=context.expert)(network)
        return LoraHandle(network)
