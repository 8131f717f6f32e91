"""Start a tiny r x r adapter on the first step of full fine-tuning (LoRA-SB, arXiv 2411.19557)."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from peft.tuners.lora.variants import _register_frozen_peft_weight
from torch import Tensor, nn

from valign.adapters.base import AdapterHandle, AttachContext, InitReport, LoraHandle, LowRankOptions
from valign.adapters.factors import (
    FactorVariant,
    LoraFactors,
    add_parameter,
    fresh_linears,
    mark,
    only_adapter,
    weight_of,
    write_factors,
)
from valign.adapters.spectrum import exact_svd, randomized_svd
from valign.checks import UserError, check_range
from valign.methods import Method

METHOD = Method(
    slug="lora-sb",
    title="LoRA-SB: only r x r numbers per layer, started from the gradient",
    paper="arXiv 2411.19557",
    room="adapters",
    entry="valign.adapters.lora_sb:LoRASB",
    fidelity="exact",
    note="the paper's formulas; the released code's bfloat16 factors, uneven weights of batches and inexact "
    "decomposition are not followed",
)

FRACTION = 0.001  # of the data, for the gradient
FLOOR = 32  # samples


class CoreStart(NamedTuple):
    """``scale * up @ core @ down`` is the step; ``up`` has orthonormal columns, ``down`` orthonormal rows."""

    down: Float[Tensor, "rank fan_in"]
    core: Float[Tensor, "rank rank"]
    up: Float[Tensor, "fan_out rank"]


def first_step(gradient: Float[Tensor, "fan_out fan_in"], *, learning_rate: float) -> Float[Tensor, "fan_out fan_in"]:
    """AdamW's first step, ``-learning_rate * sign(gradient)``; 0 where the gradient is 0."""
    check_range("first_step.learning_rate", learning_rate, above=0)
    return -learning_rate * gradient.sign()


def core_start(
    step: Float[Tensor, "fan_out fan_in"],
    rank: int,
    *,
    scale: float = 1.0,
    niter: int | None = None,
    oversample: int = 8,
    generator: torch.Generator | None = None,
) -> CoreStart:
    """The best rank-``rank`` part of ``step``: ``U``, ``diag(S) / scale``, ``V^T`` of its SVD.

    Args:
        scale: LoRA's ``alpha / rank``, > 0.
        niter: None for the exact SVD, else rounds of a randomized one, which needs ``generator``.
    Raises: ValueError for a rank outside ``[1, min(shape)]``, a scale that is not positive, or ``niter`` without ``generator``.
    """
    check_range("core_start.rank", rank, low=1, high=min(step.shape), hint=f"The weight is {tuple(step.shape)}.")
    check_range("core_start.scale", scale, above=0)
    if niter is None:
        u, s, vh = exact_svd(step)
    elif generator is None:
        raise ValueError("core_start.generator must be given with niter, got None. A randomized SVD draws from it.")
    else:
        u, s, vh = randomized_svd(step, rank, niter=niter, oversample=oversample, generator=generator)
    return CoreStart(down=vh[:rank], core=torch.diag(s[:rank] / scale), up=u[:, :rank])


class Core(FactorVariant):
    """``s B R A``: A and B are frozen, R trains."""

    def factors(self, layer: Any, name: str) -> LoraFactors:
        return LoraFactors(layer.lora_A[name].weight, layer.lora_B[name].weight @ layer.lora_core[name], float(layer.scaling[name]))


@dataclass(frozen=True, kw_only=True)
class LoRASB:
    """``W + s B R A`` with ``B A`` the leading directions of the first full fine-tuning step, frozen; ``R`` alone trains,
    ``r^2`` numbers.

    ``g = sum_i grad_W loss(W, x_i)``, ``-lr * sign(g) ~ U_r S_r V_r^T``, then ``B = U_r``, ``A = V_r^T``, ``R = diag(S_r) / s``.
    The model does **not** start at its base function: it has made that first step. The gradient of R is ``s B^T g A^T``; as B and A
    are orthonormal, a step on R is the best approximation of a step on W, without a preconditioner.

    Calling it runs ``loss`` on ``count`` samples with the adapter off, and returns an `InitReport`.
    Raises: UserError for no samples or a loss without gradient; ValueError naming a module whose gradient is zero or not finite; as
        `fresh_linears` says, with tied weights refused.
    Source: sections 3-4 as quoted by public summaries, and the authors' code; where the two differ, the formulas.
    """

    samples: Iterable[Any]  # what `loss` takes, one after the other; a list or a loader
    loss: Callable[[nn.Module, Any], Tensor]  # (model, sample) -> scalar; summed over samples, so do not average over a loader
    learning_rate: float  # of the first optimizer step, warm-up included
    count: int | None = None  # samples to take; None: max(32, 0.1 % of the data) where the data say their number, else all
    train_mode: bool = False  # leave dropout on while the gradient is taken, as the authors' code does
    allow_scale: bool = False  # alpha != rank without a warning
    niter: int | None = None  # None: exact SVD; else rounds of a randomized one; 10 is enough
    oversample: int = 8
    generator: torch.Generator | None = None  # of the randomized SVD
    reduce: Callable[[Tensor], Tensor] | None = None  # sum over processes, taken before the sign

    def __post_init__(self) -> None:
        check_range("LoRASB.learning_rate", self.learning_rate, above=0)
        if self.count is not None:
            check_range("LoRASB.count", self.count, low=1)
        if self.niter is not None:
            check_range("LoRASB.niter", self.niter, low=0)
            if self.generator is None:
                raise ValueError("LoRASB.generator must be given with niter, got None. A randomized SVD draws from it.")

    def __call__(self, model: nn.Module, adapter: str | None = None) -> InitReport:
        adapter = only_adapter(model, adapter)
        layers = fresh_linears(model, adapter, "LoRASB", rewrites_base=True)
        scaled = sorted({float(layer.scaling[adapter]) for layer in layers.values()} - {1.0})
        if scaled and not self.allow_scale:
            warnings.warn(f"LoRA-SB is meant for lora_alpha == r, got a scale of {scaled[0]:g}; R is divided by it.", stacklevel=2)
        starts = {}
        for name, gradient in self._gradients(model, layers).items():
            step = first_step(gradient, learning_rate=self.learning_rate)
            rank, scale = layers[name].r[adapter], float(layers[name].scaling[adapter])
            starts[name] = core_start(
                step, rank, scale=scale, niter=self.niter, oversample=self.oversample, generator=self.generator
            )
        install_core(model, adapter)
        for name, start in starts.items():
            write_factors(layers[name], adapter, down=start.down, up=start.up)
            with torch.no_grad():
                layers[name].lora_core[adapter].copy_(start.core)
        return InitReport(
            method="lora-sb",
            adapter=adapter,
            roles=dict.fromkeys(layers, "gradient"),
            trainable=sum(layer.lora_core[adapter].numel() for layer in layers.values()),
            keeps_function=False,
            keeps_base=True,
        )

    def _gradients(self, model: nn.Module, layers: dict[str, Any]) -> dict[str, Tensor]:
        """Summed gradient per module, float32, of the model without the adapter."""
        weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
        sums = {name: torch.zeros_like(weight_of(layer)) for name, layer in layers.items()}
        wanted, taken = self._wanted(), 0
        with bare_base(model, layers, weights, train=self.train_mode):
            for sample in islice(iter(self.samples), wanted):
                loss = self.loss(model, sample)
                if not loss.requires_grad:
                    raise UserError(
                        "LoRASB.loss must depend on the adapted weights, got a loss without gradient. Do not detach it."
                    )
                found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for (name, layer), gradient in zip(layers.items(), found, strict=True):
                    if gradient is not None:
                        sums[name] += (gradient.T if layer.fan_in_fan_out else gradient).to(sums[name].dtype)
                taken += 1
        if not taken:
            raise UserError("LoRASB.samples must hold at least one sample, got 0. Give it training data.")
        if wanted is not None and taken < wanted:
            warnings.warn(f"LoRA-SB wanted {wanted} samples for the gradient, and there were {taken}.", stacklevel=3)
        if self.reduce is not None:
            sums = {name: self.reduce(gradient) for name, gradient in sums.items()}
        for name, gradient in sums.items():
            if not gradient.isfinite().all() or not gradient.any():
                kind = "only zeros" if gradient.isfinite().all() else "NaN or infinity"
                raise ValueError(
                    f"LoRASB must have a gradient in every module, got {kind} in {name}. Leave it out of target_modules."
                )
        return sums

    def _wanted(self) -> int | None:
        if self.count is not None:
            return self.count
        return max(FLOOR, ceil(FRACTION * len(self.samples))) if isinstance(self.samples, Sized) else None


def install_core(model: nn.Module, adapter: str | None = None) -> None:
    """Give a new LoRA LoRA-SB's structure with ``R = 0``: what a saved state is loaded into, on a fresh base and without data."""
    adapter = only_adapter(model, adapter)
    for layer in fresh_linears(model, adapter, "LoRASB").values():
        down = layer.lora_A[adapter].weight
        rank = layer.r[adapter]
        add_parameter(layer, "lora_core", adapter, torch.zeros(rank, rank, dtype=down.dtype, device=down.device))
        for attribute in ("lora_A", "lora_B"):
            _register_frozen_peft_weight(layer, adapter, attribute)
        layer.lora_variant[adapter] = Core()
        mark(layer, adapter, "LoRASB")


@contextmanager
def bare_base(model: nn.Module, layers: Mapping[str, Any], weights: Mapping[str, nn.Parameter], *, train: bool) -> Iterator[None]:
    """The base model with gradients to these weights only; everything is put back."""
    asked = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    off = [(layer, layer.disable_adapters) for layer in layers.values()]
    try:
        model.train(train)
        for layer in layers.values():
            layer.enable_adapters(False)
        model.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for layer, was in off:
            layer.enable_adapters(not was)
        for parameter, was in asked:
            parameter.requires_grad_(was)
        for module, was in modes:
            module.training = was


@dataclass(frozen=True, kw_only=True)
class LoRASBOptions(LowRankOptions):
    """`LoRASB` as an adapter, its start taken on the training rows."""

    expert: ClassVar[bool] = True

    rank: int = 24  # trains rank^2 numbers per module
    samples: int = FLOOR  # rows for the gradient, at least

    def attach(self, context: AttachContext) -> AdapterHandle:
        network, losses = self.new_lora(context), context.first_losses(self.samples)
        LoRASB(
            samples=losses,
            count=len(losses),
            loss=lambda _, loss: loss(),
            learning_rate=context.first_learning_rate(self.learning_rate),
            allow_scale=True,
            reduce=context.reduce,
        )(network)
        return LoraHandle(network)
