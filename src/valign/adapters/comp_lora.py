"""Keep LoRA's change out of each weight's strongest directions (Comp-LoRA, arXiv 2501.15040; a reconstruction)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from valign.adapters.base import AdapterHandle, AttachContext, InitReport, LoraHandle, LowRankOptions
from valign.adapters.factors import (
    FactorVariant,
    LoraFactors,
    add_buffer,
    fresh_linears,
    lora_layers,
    mark,
    only_adapter,
    weight_of,
)
from valign.adapters.spectrum import exact_svd, randomized_svd
from valign.checks import check_choice, check_range
from valign.methods import Method

METHOD = Method(
    slug="comp-lora",
    title="Comp-LoRA: LoRA in the complement of the strongest directions",
    paper="arXiv 2501.15040",
    room="adapters",
    entry="valign.adapters.comp_lora:CompLoRA",
    fidelity="variant",
    note="a reconstruction from the abstract and reviews: side, number of directions and hardness of the constraint are ours",
)

Side = Literal["left", "right", "both"]
Mode = Literal["hard", "gradient", "penalty"]
SIDES = ("left", "right")
OVERSAMPLE = 10  # columns of the randomized SVD beyond those that are kept
OFF_AXIS = 1e-3  # a randomized basis further from orthonormal than this is refused


class Protected(NamedTuple):
    """Orthonormal columns of the directions that a change must leave alone; none if the side is free.

    Each direction lies in one piece in memory: which is how BLAS reads it when it projects a few rows.
    """

    left: Float[Tensor, "fan_out kept"]
    right: Float[Tensor, "fan_in kept"]


def outside(rows: Float[Tensor, "row size"], basis: Float[Tensor, "size kept"]) -> Float[Tensor, "row size"]:
    """``rows (I - basis basis^T)``, without forming the projector; a few long contiguous rows are what BLAS projects fastest."""
    rows = rows.contiguous()
    return torch.addmm(rows, rows @ basis, basis.T, alpha=-1)


def overlap(delta: Float[Tensor, "fan_out fan_in"], left: Float[Tensor, "fan_out kept"]) -> float:
    """``|U_q^T delta| / |delta|`` (Frobenius), in [0, 1]: the share of a change that lies in protected directions; 0 for no
    change."""
    total = delta.norm()
    return float((left.T @ delta).norm() / total) if total else 0.0


def energy_directions(s: Float[Tensor, " rank"], energy: float) -> int:
    """The smallest q with ``sum_{i <= q} s_i^2 >= energy * sum s_i^2``."""
    check_range("energy_directions.energy", energy, above=0, high=1)
    share = s.double().square().cumsum(0)
    return int((share < energy * share[-1]).sum()) + 1


def complement(basis: Float[Tensor, "size kept"]) -> Float[Tensor, "size free"]:
    """Orthonormal columns of what is perpendicular to ``basis``; each lies in one piece in memory."""
    return torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :].T.contiguous().T


class Complement(FactorVariant):
    """``s P_U B A P_V``: the factors are projected, not the input, so it costs ``q (o + k) r`` per step, not per token.

    Where more than half of a side's directions are protected, it keeps the free ones: the same projection for less.
    """

    def factors(self, layer: Any, name: str) -> LoraFactors:
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        down, up = _projected(down, layer, name, "right"), _projected(up.T, layer, name, "left").T
        return LoraFactors(down, up, float(layer.scaling[name]))


def _projected(rows: Float[Tensor, "row size"], layer: Any, name: str, side: str) -> Float[Tensor, "row size"]:
    free = getattr(layer, f"lora_free_{side}", {})
    if name in free:
        return (rows.contiguous() @ free[name]) @ free[name].T
    return outside(rows, getattr(layer, f"lora_protect_{side}")[name])


@dataclass(frozen=True, kw_only=True)
class CompLoRA:
    """``delta W = s (I - U_q U_q^T) B A (I - V_q V_q^T)`` with the ``q`` strongest singular directions of each weight; A and B
    train.

    Inputs along the protected directions are answered as before and the main output directions are not written to, so what the
    model knew is disturbed least. The price: **a task that lives in those directions cannot be learnt**; ``side="left"`` is the
    mild setting. A is drawn by peft, B is zero, so the function is unchanged at the start. A and B after projection are plain LoRA.

    Reconstructed from the abstract and short reviews: which side, how ``q`` is chosen and whether the constraint is hard are
    choices.
    Raises: as `fresh_linears` says; ValueError where the complement is smaller than the rank.
    """

    side: Side = "both"
    mode: Mode = "hard"  # "gradient": project gradients (and `reproject` after each step); "penalty": add `penalty` to the loss
    directions: int | None = None  # q itself
    fraction: float | None = None  # q as a share of min(fan_out, fan_in), (0, 1)
    energy: float = (
        0.9  # if neither: the fewest directions with this share of the squared norm, at most min(fan_out, fan_in) - rank
    )
    niter: int | None = None  # None: exact SVD; else rounds of a randomized one, for a fixed number of directions
    generator: torch.Generator | None = None  # of the randomized SVD

    def __post_init__(self) -> None:
        check_choice("CompLoRA.side", self.side, ("left", "right", "both"))
        check_choice("CompLoRA.mode", self.mode, ("hard", "gradient", "penalty"))
        if self.directions is not None and self.fraction is not None:
            raise ValueError("CompLoRA must have directions or fraction, got both. Choose one.")
        if self.directions is not None:
            check_range("CompLoRA.directions", self.directions, low=0)
        for name in ("fraction", "energy"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"CompLoRA.{name} must be in (0, 1), got {value!r}.")
        if self.niter is not None:
            check_range("CompLoRA.niter", self.niter, low=0)
            if self.directions is None and self.fraction is None:
                raise ValueError(
                    "CompLoRA.niter must come with directions or fraction, got energy, which needs every singular value."
                )
            if self.generator is None:
                raise ValueError("CompLoRA.generator must be given with niter, got None. A randomized SVD draws from it.")

    def __call__(self, model: nn.Module, adapter: str | None = None) -> InitReport:
        adapter = only_adapter(model, adapter)
        layers = fresh_linears(model, adapter, "CompLoRA", rewrites_base=True)  # a merge would write through both of a tied pair
        found = {name: self._protect(name, layer, adapter) for name, layer in layers.items()}
        for name, basis in found.items():
            layer = layers[name]
            down = layer.lora_A[adapter].weight
            for side, kept in zip(SIDES, basis, strict=True):
                most = self.mode == "hard" and 2 * kept.shape[1] > kept.shape[0]
                attribute, value = (f"lora_free_{side}", complement(kept)) if most else (f"lora_protect_{side}", kept)
                add_buffer(layer, attribute, adapter, value.to(down.device, down.dtype), saved=False)  # remade from W, not saved
            mark(layer, adapter, "CompLoRA")
            if self.mode == "hard" and any(part.numel() for part in basis):  # nothing protected is plain LoRA
                layer.lora_variant[adapter] = Complement()
            elif self.mode == "gradient":
                _reproject(layer, adapter)
                _project_gradients(layer, adapter)
        return InitReport(
            method="comp-lora",
            adapter=adapter,
            roles={
                name: f"{self.side}, {max(basis.left.shape[1], basis.right.shape[1])} protected" for name, basis in found.items()
            },
            trainable=sum(p.numel() for layer in layers.values() for p in layer.parameters() if p.requires_grad),
            keeps_function=True,
            keeps_base=True,
        )

    def _protect(self, name: str, layer: Any, adapter: str) -> Protected:
        weight, rank = weight_of(layer), layer.r[adapter]
        size = min(weight.shape)
        fixed = self.directions if self.fraction is None else round(self.fraction * size)
        if fixed is not None and fixed > size - rank:
            raise ValueError(
                f"CompLoRA.directions must leave room for the rank in {name}: at most {size} - {rank} = {size - rank}, "
                f"got {fixed}. Protect fewer directions, or lower the rank."
            )
        if self.niter is None:
            spectrum = exact_svd(weight)
            kept = fixed if fixed is not None else min(energy_directions(spectrum.s, self.energy), size - rank)
        else:
            assert self.generator is not None
            assert fixed is not None
            kept = fixed
            spectrum = randomized_svd(weight, max(1, kept), niter=self.niter, oversample=OVERSAMPLE, generator=self.generator)
            for basis in (spectrum.u, spectrum.vh.T):
                error = (basis.T @ basis - torch.eye(basis.shape[1]).to(basis)).abs().max()
                if not error < OFF_AXIS:
                    raise ValueError(
                        f"CompLoRA.niter must give an orthonormal basis, got an error of {error:.1e} in {name}. Use None."
                    )
        left, right = (kept if self.side in (side, "both") else 0 for side in SIDES)
        return Protected(spectrum.u[:, :left].T.contiguous().T, spectrum.vh[:right].contiguous().T)


def protected(layer: Any, name: str) -> Protected:
    """The directions that ``name`` must leave alone in this layer. Raises: ValueError if Comp-LoRA did not start it."""
    found = []
    for side in SIDES:
        kept, free = (getattr(layer, f"lora_{kind}_{side}", {}) for kind in ("protect", "free"))
        if name not in kept and name not in free:
            raise ValueError(f"Comp-LoRA must have started the adapter, got {name!r}, which it did not. Call initialize first.")
        found.append(kept[name] if name in kept else complement(free[name]))
    return Protected(*found)


def reproject(model: nn.Module, adapter: str | None = None) -> None:
    """Put A and B back into the complement; ``mode="gradient"`` needs it after every step of an optimizer other than plain SGD."""
    adapter = only_adapter(model, adapter)
    for layer in lora_layers(model, adapter).values():
        _reproject(layer, adapter)


def penalty(model: nn.Module, adapter: str | None = None, *, weight: float = 1.0) -> Float[Tensor, ""]:
    """``weight * sum over layers of |U_q^T B|^2 + |A V_q|^2`` (squared Frobenius norms), to add to the loss in
    ``mode="penalty"``."""
    check_range("penalty.weight", weight, low=0)
    adapter = only_adapter(model, adapter)
    terms = []
    for layer in lora_layers(model, adapter).values():
        basis = protected(layer, adapter)
        terms.append((basis.left.T @ layer.lora_B[adapter].weight).square().sum())
        terms.append((layer.lora_A[adapter].weight @ basis.right).square().sum())
    return weight * torch.stack(terms).sum()


@torch.no_grad()
def _reproject(layer: Any, name: str) -> None:
    basis = protected(layer, name)
    for rows, side in ((layer.lora_A[name].weight, basis.right), (layer.lora_B[name].weight.T, basis.left)):
        rows.copy_(outside(rows, side))


def _project_gradients(layer: Any, name: str) -> None:
    basis = protected(layer, name)
    layer.lora_A[name].weight.register_hook(lambda gradient: outside(gradient, basis.right))
    layer.lora_B[name].weight.register_hook(lambda gradient: outside(gradient.T, basis.left).T)


@dataclass(frozen=True, kw_only=True)
class CompLoRAOptions(LowRankOptions):
    """`CompLoRA` as an adapter."""

    expert: ClassVar[bool] = True

    side: Side = "both"
    energy: float = 0.9  # of the squared norm that is protected, (0, 1)

    def attach(self, context: AttachContext) -> AdapterHandle:
        network = self.new_lora(context)
        CompLoRA(side=self.side, energy=self.energy)(network)
        return LoraHandle(network)
