"""Noise on the weights while LoRA trains, shaped by weights and gradients (LoRA-GGPO, arXiv 2502.14538 v1)."""

import warnings
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from valign.adapters.factors import weight_of
from valign.checks import check_choice, check_range
from valign.methods import Method
from valign.optimizers.perturbation import Perturbation, PerturbationOptions, row_norms

METHOD = Method(
    slug="lora-ggpo",
    title="LoRA-GGPO: noise on the weights, shaped by weights and gradients",
    paper="arXiv 2502.14538",
    room="optimizers",
    entry="valign.optimizers.ggpo:GGPO",
    fidelity="exact",
    note="as in kohya-ss/sd-scripts, whose estimate of row norms is a setting; exact norms by default",
)

SAMPLED_ROWS = 1000  # of the estimated mean row norm


def noise_std(
    base_norm: float,
    update_norms: Float[Tensor, " row"],
    gradient_norms: Float[Tensor, " row"],
    *,
    sigma: float,
    beta: float,
    size: int,
) -> Float[Tensor, " row"]:
    """``(sigma sqrt(base^2 + update_i^2) + beta gradient_i^2) / sqrt(size)``: the gradient's norm is squared, the weight's is not.

    Args:
        base_norm: Mean L2 norm of the frozen weight's rows.
        update_norms: L2 norms of the rows of ``B A``.
        gradient_norms: L2 norms of the rows of ``s (B grad_A + grad_B A)``.
        size: Rows of the weight, or columns.
    """
    return (sigma * (base_norm**2 + update_norms**2).sqrt() + beta * gradient_norms**2) / sqrt(size)


class GGPO(Perturbation):
    """In training mode ``y += E x`` with fresh ``E_ij ~ N(0, std_i^2)``; ``std`` of the step before, see `noise_std`.

    For squared error this adds exactly ``sum_i std_i^2 |x|^2`` to the expected loss, else half of it weighted by the curvature:
    flatter minima. There is no noise before the first step, at evaluation or in the merged weight. The cost is about one more
    product with the frozen weight per layer. ``noise="output"`` draws ``std |x| n`` per token instead: the same distribution per
    token, independent across tokens, and cheap.

    Under gradient checkpointing the recomputed forward gets the noise of the first one; a layer must not be called twice in one
    checkpointed segment. With several processes give each its own generator, and reduce gradients before the step.

    Args:
        sigma, beta: Weight and gradient part, >= 0; 0.03 and 0.01 as in sd-scripts. None for one of them is 0, with a warning.
        norm_dim: Divide by the square root of the rows (``"out"``, sd-scripts) or of the columns (``"in"``).
        row_norms: ``"exact"``, or ``"estimate"`` from up to 1000 random rows as in sd-scripts.
        scaled: Count LoRA's scale in the norm of ``B A``; sd-scripts computes it and then drops it.
        generator: Where the noise's seed (and the sampled rows) come from.
    Raises: ValueError for negative numbers; as `Perturbation`.
    Source: v1's formula as sd-scripts implements it; v2 of the paper is another method, see `MGPO`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        generator: torch.Generator,
        sigma: float | None = 0.03,
        beta: float | None = 0.01,
        noise: Literal["weight", "output"] = "weight",
        norm_dim: Literal["out", "in"] = "out",
        row_norms: Literal["exact", "estimate"] = "exact",
        scaled: bool = False,
        adapter: str | None = None,
    ) -> None:
        if (sigma is None) != (beta is None):
            warnings.warn("GGPO has only one of sigma and beta; the other is 0.", stacklevel=2)
        self.sigma, self.beta = sigma or 0.0, beta or 0.0
        check_range("GGPO.sigma", self.sigma, low=0)
        check_range("GGPO.beta", self.beta, low=0)
        check_choice("GGPO.noise", noise, ("weight", "output"))
        check_choice("GGPO.norm_dim", norm_dim, ("out", "in"))
        check_choice("GGPO.row_norms", row_norms, ("exact", "estimate"))
        self.noise, self.norm_dim, self.scaled = noise, norm_dim, scaled
        super().__init__(model, optimizer, adapter=adapter)
        self.base_norms = {name: self._base_norm(name, row_norms, generator) for name in self.layers}
        self.seed = int(torch.randint(2**40, (), generator=generator))
        self.std: dict[str, Tensor] = {}
        self._places = {name: place for place, name in enumerate(self.layers)}
        self.calls = dict.fromkeys(self.layers, 0)
        self._open: dict[str, list[int]] = {name: [] for name in self.layers}
        self._attach()

    def shift(self, name: str, x: Float[Tensor, "*batch fan_in"]) -> Float[Tensor, "*batch fan_out"] | None:
        if name not in self.std or not (self.sigma or self.beta):
            return None
        std, generator = self.std[name], self._generator(name, x.device)
        if self.noise == "output":
            size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return size * (torch.randn(*x.shape[:-1], len(std), generator=generator, device=x.device) * std).to(x.dtype)
        shape = (len(std), x.shape[-1])
        return linear(x, (torch.randn(shape, generator=generator, device=x.device) * std[:, None]).to(x.dtype))

    @torch.no_grad()
    def before_step(self) -> None:
        for name, layer in self.layers.items():
            (a, b, scale), size = self.factors(name), layer.out_features if self.norm_dim == "out" else layer.in_features
            grad_a, grad_b = (torch.zeros_like(p) if p.grad is None else p.grad for p in (a, b))
            gradient = scale * row_norms(torch.cat([b, grad_b], dim=1), torch.cat([grad_a, a]))
            update = (scale if self.scaled else 1.0) * row_norms(b, a)
            self.std[name] = noise_std(self.base_norms[name], update, gradient, sigma=self.sigma, beta=self.beta, size=size)
            self._open[name].clear()

    def after_step(self) -> None:
        """Nothing: the noise of the next step is that of this step's weights and gradients."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        std = {name: std.clone() for name, std in self.std.items()}
        return {"seed": self.seed, "calls": dict(self.calls), "std": std, "base_norms": dict(self.base_norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the same noise. Raises: UserError for a state of other modules."""
        self.check_modules(state["calls"])
        self.seed, self.calls, self.base_norms = state["seed"], dict(state["calls"]), dict(state["base_norms"])
        self.std = {name: std.to(self.factors(name)[0].device, copy=True) for name, std in state["std"].items()}

    def _generator(self, name: str, device: torch.device) -> torch.Generator:
        """A generator of its own for each module and call; a forward that the backward pass repeats gets its first one's."""
        if torch._C._current_graph_task_id() != -1 and self._open[name]:
            call = self._open[name].pop()
        else:
            call = self.calls[name]
            self.calls[name] += 1
            self._open[name].append(call)
        return torch.Generator(device).manual_seed(self.seed + call * len(self.layers) + self._places[name])

    @torch.no_grad()
    def _base_norm(self, name: str, how: str, generator: torch.Generator) -> float:
        if not self.layers[name].get_base_layer().weight.is_floating_point():
            raise TypeError(f"GGPO must read float weights, got {name} quantized. Use MGPO, which does not need them.")
        weight = weight_of(self.layers[name])
        if how == "estimate":
            weight = weight[torch.randperm(len(weight), generator=generator)[:SAMPLED_ROWS].to(weight.device)]
        return float(weight.norm(dim=1).mean())


@dataclass(frozen=True, kw_only=True)
class GGPOOptions(PerturbationOptions):
    """`GGPO`."""

    sigma: float = 0.03
    beta: float = 0.01
    noise: Literal["weight", "output"] = "weight"

    def start(self, network: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> Perturbation:
        return GGPO(network, optimizer, generator=generator, sigma=self.sigma, beta=self.beta, noise=self.noise)
