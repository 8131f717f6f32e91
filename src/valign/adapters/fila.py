"""Start a LoRA on the directions that hold what is to be forgotten (FILA, arXiv 2408.06621)."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from valign.adapters.base import AdapterHandle, AttachContext, CountedLoss, InitReport, LoraHandle, LowRankOptions
from valign.adapters.factors import (
    START,
    add_buffer,
    fresh_linears,
    mark,
    only_adapter,
    save_for_any_base,
    weight_of,
    write_factors,
    write_weight,
)
from valign.adapters.lora_sb import bare_base
from valign.adapters.spectrum import exact_svd
from valign.checks import UserError, check_range
from valign.methods import Method

METHOD = Method(
    slug="fila",
    title="FILA: LoRA started where the forget set's Fisher information outweighs the retain set's",
    paper="arXiv 2408.06621",
    room="adapters",
    entry="valign.adapters.fila:FILA",
    fidelity="exact",
    note="the released formulas with an exact decomposition instead of a randomized one, and dropout off",
)

EPS = 1e-5  # of the code, in the ratio and in the division by row weights


class WeightedStart(NamedTuple):
    """``scale * up @ down`` is the best approximation of the weight under its row weights."""

    down: Float[Tensor, "rank fan_in"]
    up: Float[Tensor, "fan_out rank"]


class FisherMean:
    """``sum of c_b (dL_b / dW)^2 / sum of c_b`` over batches with c_b trained tokens: each batch's mean gradient, squared."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._weight = 0.0

    def add(self, gradient: Float[Tensor, "fan_out fan_in"], weight: float = 1.0) -> None:
        """Raises: ValueError for a batch without trained tokens."""
        check_range("FisherMean.weight", weight, above=0, hint="Leave out batches without trained tokens.")
        self._sum, self._weight = self._sum + weight * gradient.detach().float().square(), self._weight + weight

    @property
    def mean(self) -> Float[Tensor, "fan_out fan_in"]:
        return self._sum / self._weight  # type: ignore[return-value]


def relative_importance(
    forget: Float[Tensor, "fan_out fan_in"], retain: Float[Tensor, "fan_out fan_in"], *, eps: float = EPS
) -> Float[Tensor, "fan_out fan_in"]:
    """``F_forget / (eps + F_retain)``, entry by entry; warns where ``eps`` outweighs the retain set's median."""
    if retain.median() < eps:
        warnings.warn(
            f"The retain set's median Fisher value {retain.median().item():.2g} is below eps {eps:g}, so importances are nearly "
            "those of the forget set alone. Lower eps.",
            stacklevel=2,
        )
    return forget / (eps + retain)


def weighted_start(
    weight: Float[Tensor, "fan_out fan_in"],
    importance: Float[Tensor, "fan_out fan_in"],
    rank: int,
    *,
    scale: float,
    eps: float = EPS,
    module: str = "the weight",
) -> WeightedStart:
    """``B0, A0`` that minimize ``|diag(d) (W - scale B A)|`` with ``d_i = sqrt(sum over j of importance_ij)``, in float32 at least.

    ``U S V^T`` is the truncated decomposition of ``diag(d) W``; ``A0 = sqrt(S / scale) V^T``,
    ``B0 = diag(1 / (d + eps)) U sqrt(S / scale)``.

    Raises: ValueError for a rank or scale out of range, or importances of another shape, negative or not finite.
    """
    check_range("weighted_start.rank", rank, low=1, high=min(weight.shape), hint=f"{module} is {tuple(weight.shape)}.")
    check_range("weighted_start.scale", scale, above=0)
    if importance.shape != weight.shape:
        raise ValueError(f"The importance of {module} must have shape {tuple(weight.shape)}, got {tuple(importance.shape)}.")
    if not (importance.isfinite() & (importance >= 0)).all():
        raise ValueError(f"The importance of {module} must be finite and >= 0, got another value. Look at the losses.")
    rows = importance.sum(1).sqrt().to(torch.promote_types(weight.dtype, torch.float32))
    if not rows.all():
        warnings.warn(f"{int((rows == 0).sum())} rows of {module} have no importance and start at 0.", stacklevel=2)
    found = exact_svd(rows[:, None] * weight)
    root = (found.s[:rank] / scale).sqrt()
    up = (found.u[:, :rank] * root) / (rows + eps)[:, None]
    up = torch.where(rows[:, None] > 0, up, 0)  # of a row of zeros the decomposition leaves rounding, which 1 / eps magnifies
    return WeightedStart(down=root[:, None] * found.vh[:rank], up=up)


@dataclass(frozen=True, kw_only=True)
class FILA:
    """``W <- W - s B0 A0`` and LoRA from ``(A0, B0)``: the function stays, training starts on the forget set's directions.

    Calling it returns an `InitReport` and changes the model in place. Switching the adapter off then gives the residual, not the
    model as it was: take references before.

    Raises: ValueError if an importance is missing or does not fit, for DoRA, tied, quantized or merged weights, and as
        `fresh_linears` and `weighted_start` say.
    """

    importances: Mapping[str, Float[Tensor, "fan_out fan_in"]]  # by module name, without peft's prefix
    eps: float = EPS

    def __post_init__(self) -> None:
        check_range("FILA.eps", self.eps, above=0)

    def __call__(self, model: nn.Module, adapter: str | None = None) -> InitReport:
        adapter = only_adapter(model, adapter)
        layers = fresh_linears(model, adapter, "FILA", rewrites_base=True)
        skipped = tuple(name for name, layer in layers.items() if layer.lora_A[adapter].weight.is_meta)
        wanted = [name for name in layers if name not in skipped]
        missing = [name for name in wanted if name not in self.importances]
        if missing:
            raise ValueError(f"FILA.importances must cover every target, got none for {', '.join(missing[:4])}. Estimate anew.")
        # every decomposition before the first change: an error leaves the model as it was
        starts = {name: self._start(name, layers[name], adapter) for name in wanted}
        for name, start in starts.items():
            layer = layers[name]
            write_factors(layer, adapter, down=start.down, up=start.up)
            down, up = (matrix[adapter].weight.detach().clone() for matrix in (layer.lora_A, layer.lora_B))
            for attribute, value in zip(START, (down, up), strict=True):
                add_buffer(layer, attribute, adapter, value)
            mark(layer, adapter, "FILA")
            write_weight(layer, weight_of(layer) - layer.scaling[adapter] * (up.to(start.up) @ down.to(start.up)))
        save_for_any_base(model, adapter)
        return InitReport(
            method="fila",
            adapter=adapter,
            roles=dict.fromkeys(wanted, "weighted"),
            trainable=sum(p.numel() for layer in layers.values() for p in layer.parameters() if p.requires_grad),
            keeps_function=True,
            keeps_base=False,
            skipped=skipped,
        )

    def _start(self, name: str, layer: Any, adapter: str) -> WeightedStart:
        importance = self.importances[name].to(weight_of(layer).device)
        return weighted_start(
            weight_of(layer), importance, layer.r[adapter], scale=layer.scaling[adapter], eps=self.eps, module=name
        )


def fila_init(
    peft_model: nn.Module,
    importances: Mapping[str, Float[Tensor, "fan_out fan_in"]],
    adapter_name: str = "default",
    eps: float = EPS,
) -> InitReport:
    """`FILA` on a ``PeftModel`` whose LoRA is new."""
    return FILA(importances=importances, eps=eps)(peft_model, adapter_name)


def fisher_importances(
    model: nn.Module,
    layers: Mapping[str, Any],
    batches: Iterable[tuple[CountedLoss, CountedLoss]],
    *,
    eps: float = EPS,
) -> dict[str, Float[Tensor, "fan_out fan_in"]]:
    """`relative_importance` of each LoRA layer's base weight, without the adapter, in evaluation mode.

    Args:
        batches: Of the forget set, each with one of the retain set: functions that return the mean loss of a batch and how many
            tokens it counts.
    Raises: UserError without a batch, or if a loss does not depend on the weights.
    """
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    sums = [{name: FisherMean() for name in layers} for _ in range(2)]
    taken = 0
    with bare_base(model, layers, weights, train=False):
        for pair in batches:
            taken += 1
            for side, compute in zip(sums, pair, strict=True):
                loss, count = compute()
                if not loss.requires_grad:
                    raise UserError("FILA's losses must depend on the adapted weights, got one without gradient. Do not detach it.")
                found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for (name, layer), gradient in zip(layers.items(), found, strict=True):
                    if gradient is None:
                        raise UserError(f"FILA must have a gradient in every module, got none in {name}. Drop it from the targets.")
                    side[name].add(gradient.T if layer.fan_in_fan_out else gradient, count)
    if not taken:
        raise UserError("FILA must have rows to forget, got none. Add rows to the forget file.")
    return {name: relative_importance(sums[0][name].mean, sums[1][name].mean, eps=eps) for name in layers}


@dataclass(frozen=True, kw_only=True)
class FILAOptions(LowRankOptions):
    """`FILA` as an adapter, its importances taken over the forget set once."""

    forgets: ClassVar[bool] = True

    rank: int = 8
    alpha: float | None = 16.0  # the authors' 2 r
    learning_rate: float = 2e-4
    eps: float = EPS

    def attach(self, context: AttachContext) -> AdapterHandle:
        if not context.forget:
            raise UserError("fila must have rows to forget, got none. Give --forget FILE and --preserve ihl.")
        network = self.new_lora(context)
        adapter = only_adapter(network, None)
        layers = fresh_linears(network, adapter, "FILA", rewrites_base=True)
        FILA(importances=fisher_importances(network, layers, context.forget, eps=self.eps), eps=self.eps)(network)
        return LoraHandle(network)
