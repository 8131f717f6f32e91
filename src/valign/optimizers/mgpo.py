"""Look ahead along the momentum while LoRA trains (LoRA-MGPO, arXiv 2502.14538 v2), the authors' successor of GGPO."""

from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from valign.checks import check_range
from valign.methods import Method
from valign.optimizers.perturbation import Perturbation, PerturbationOptions, widened

METHOD = Method(
    slug="lora-mgpo",
    title="LoRA-MGPO: a step ahead along the momentum, scaled by the gradient's history",
    paper="arXiv 2502.14538",
    room="optimizers",
    entry="valign.optimizers.mgpo:MGPO",
    fidelity="exact",
    note="the paper's shift with the sign of the authors' code, added in the forward pass",
)

TINY = 1e-12
MAX_SCALE = 10.0


class Shift(NamedTuple):
    """``up @ down``, the perturbation of a weight."""

    down: Float[Tensor, "rank fan_in"]
    up: Float[Tensor, "fan_out rank"]


def product_norm(up: Float[Tensor, "row rank"], down: Float[Tensor, "rank column"]) -> float:
    """Frobenius norm of ``up @ down``, without forming it."""
    return sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))


class MGPO(Perturbation):
    """In training mode the weight is shifted by ``eps = -rho v / |v| min(1 / gbar, 10)``, ``v = s (m_B A + B m_A)``.

    ``m`` is the optimizer's momentum, ``gbar`` a running mean of ``|s (g_B A + B g_A)|``. The sign is as in the authors' code:
    along the descent direction, so it looks ahead where SAM climbs; ``ascent`` turns it round. The shift is added in the forward
    pass, so the frozen weight is never touched. There is none before the first step. No second backward pass.

    Args:
        optimizer: One with momentum: ``exp_avg`` (Adam and its kin) or ``momentum_buffer`` (SGD); its beta1 is the paper's mu.
        rho: Size of the shift, >= 0; 0.05 for understanding, 0.01 for generation.
        beta: Of the running mean, [0, 1); 0.9 and 0.8.
    Raises: ValueError for numbers outside their range or an optimizer without momentum (at its first step, where only that tells);
        as `Perturbation`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        rho: float = 0.05,
        beta: float = 0.9,
        ascent: bool = False,
        adapter: str | None = None,
    ) -> None:
        check_range("MGPO.rho", rho, low=0)
        if not 0 <= beta < 1:
            raise ValueError(f"MGPO.beta must be in [0, 1), got {beta!r}.")
        for group in optimizer.param_groups:
            mu = group["betas"][0] if "betas" in group else group.get("momentum", 0)
            if not 0 <= mu < 1 or ("betas" not in group and not mu):
                raise ValueError(f"MGPO.optimizer must keep a momentum, of [0, 1), got {mu!r}. Use AdamW, or SGD with momentum.")
        self.rho, self.beta, self.sign = rho, beta, 1.0 if ascent else -1.0
        super().__init__(model, optimizer, adapter=adapter)
        self.mean: dict[str, float] = {}  # gbar
        self.shifts: dict[str, Shift] = {}
        self.after_step()  # a restored optimizer has momentum already
        self._attach()

    def shift(self, name: str, x: Float[Tensor, "*batch fan_in"]) -> Float[Tensor, "*batch fan_out"] | None:
        if name not in self.shifts or not self.rho:
            return None
        found = self.shifts[name]
        return linear(linear(x, found.down.to(x.dtype)), found.up.to(x.dtype))

    @torch.no_grad()
    def before_step(self) -> None:
        for name in self.layers:
            a, b, scale = self.factors(name)
            if a.grad is None or b.grad is None:
                continue
            size = abs(scale) * product_norm(widened(torch.cat([b.grad, b], dim=1)), widened(torch.cat([a, a.grad])))
            self.mean[name] = size if name not in self.mean else self.beta * self.mean[name] + (1 - self.beta) * size

    @torch.no_grad()
    def after_step(self) -> None:
        for name in self.layers:
            a, b, scale = self.factors(name)
            moments = [_momentum(self.optimizer, parameter) for parameter in (a, b)]
            self.shifts.pop(name, None)
            if moments[0] is None or moments[1] is None:
                continue
            down, up = widened(torch.cat([a, moments[0]])), scale * widened(torch.cat([moments[1], b], dim=1))
            size = product_norm(up, down)
            if size > TINY:
                factor = min(1 / (self.mean[name] + TINY), MAX_SCALE) if name in self.mean else 1.0
                self.shifts[name] = Shift(down, self.sign * self.rho * factor / size * up)

    def state_dict(self) -> dict[str, Any]:
        """The running means; the shifts follow from weights and optimizer."""
        return {"modules": sorted(self.layers), "mean": dict(self.mean)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore after the weights and the optimizer. Raises: UserError for a state of other modules."""
        self.check_modules(dict.fromkeys(state["modules"]))
        self.mean = dict(state["mean"])
        self.after_step()


def _momentum(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor | None:
    state = optimizer.state.get(parameter, {})
    if not state:
        return None
    found = state.get("exp_avg", state.get("momentum_buffer"))
    if not isinstance(found, Tensor) or found.shape != parameter.shape:
        raise ValueError(
            f"MGPO.optimizer must keep exp_avg or momentum_buffer of its parameters' shapes, got {type(optimizer).__name__} "
            f"without one of {tuple(parameter.shape)}. Use AdamW, or SGD with momentum."
        )
    return found


@dataclass(frozen=True, kw_only=True)
class MGPOOptions(PerturbationOptions):
    """`MGPO`."""

    rho: float = 0.05
    decay: float = 0.9  # of the running mean, its beta

    def start(self, network: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> Perturbation:
        return MGPO(network, optimizer, rho=self.rho, beta=self.decay)
