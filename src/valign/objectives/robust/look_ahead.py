"""Safety that survives benign fine-tuning: the objective is also taken where that would lead (ResAlign, arXiv 2507.16302).

``L = S(theta) + share (S(theta*) - S(theta))``: S is any safety objective, theta* a fine-tuning of theta on harmless data,
simulated at every step with settings drawn anew. The gradient through theta* is that of the Moreau envelope,
``theta* = argmin F(x) + |x - theta|^2 / (2 proximity)``: ``(I + proximity H)^-1 dS(theta*)`` with H the Hessian of F at theta*.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError, check_options, check_range, option
from valign.methods import Method

METHOD = Method(
    slug="resalign",
    title="ResAlign: safety adapters trained with a look-ahead on benign fine-tuning",
    paper="arXiv 2507.16302",
    room="objectives",
    entry="valign.objectives.robust.look_ahead:LookAhead",
    fidelity="variant",
    note="our safety objective and adapter; fine-tunings on the safe side of the pairs, in weights beside the adapter; "
    "Hessian products by central differences; gradients averaged over the drawn fine-tunings, without a meta rate",
)
WAYS = ("lora", "full")


@dataclass(frozen=True, kw_only=True)
class LookAhead:
    """How benign fine-tuning is simulated. Every step draws ``scenarios`` settings from the lists.

    Raises: ValueError for a value out of range, UserError for an empty list or an unknown way.
    """

    look_ahead_share: float = option(
        0.8, help="weight of the loss after a simulated fine-tuning; the rest is the loss as it is", above=0, high=1
    )
    scenarios: int = option(1, help="simulated fine-tunings per step; 3 in the paper", low=1)
    inner_steps: tuple[int, ...] = option((4, 8, 16), help="optimizer steps of a simulated fine-tuning, drawn from these")
    inner_rates: tuple[float, ...] = option((3e-4, 1e-3, 3e-3), help="its learning rates (Adam); a tenth of it for full")
    inner_ways: tuple[str, ...] = option(WAYS, help="what it trains: lora (a new LoRA beside the adapter) or full (the weights)")
    inner_ranks: tuple[int, ...] = option((4, 16), help="ranks of its LoRA", rare=True)
    inner_rows: int = option(32, help="pairs whose safe side is its data set, drawn anew", low=1, rare=True)
    inner_batch: int = option(8, help="images per step of it", low=1, rare=True)
    inner_targets: tuple[str, ...] = option(
        ("to_q", "to_k", "to_v", "to_out.0"), help="ending of the linear layers that it changes", rare=True
    )
    implicit_steps: int = option(
        1, help="Richardson iterations of the implicit gradient; 5 in the paper. 0: to first order", low=0, rare=True
    )
    proximity: float = option(
        1.0, help="of the Moreau envelope; less where the iteration would grow", above=0, rare=True, needs={"implicit_steps": ()}
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name, low in (("inner_steps", 0), ("inner_ranks", 1)):
            self._check_listed(name)
            for count in getattr(self, name):
                check_range(f"LookAhead.{name}", count, low=low)
        for name in ("inner_rates", "inner_ways", "inner_targets"):
            self._check_listed(name)
        for rate in self.inner_rates:
            check_range("LookAhead.inner_rates", rate, above=0.0)
        for way in self.inner_ways:
            if way not in WAYS:
                raise UserError(f"LookAhead.inner_ways must be among {', '.join(WAYS)}, got {way!r}.")

    def _check_listed(self, name: str) -> None:
        if not getattr(self, name):
            raise UserError(f"LookAhead.{name} must not be empty, got an empty list. Name at least one.")


class ImplicitGradient(NamedTuple):
    """The gradient, and the proximity that it was taken at: what was asked for, or less."""

    gradient: Float[Tensor, " weight"]
    proximity: float


def implicit_gradient(
    gradient: Float[Tensor, " weight"],
    curvature: Callable[[Float[Tensor, " weight"]], Float[Tensor, " weight"]],
    *,
    proximity: float,
    iterations: int,
) -> ImplicitGradient:
    """``(I + proximity H)^-1 gradient`` by Richardson's iteration ``v <- gradient - proximity H v`` from ``v = gradient``.

    Where a product would be longer than v, the iteration would not converge: the proximity is then cut so that it is half as long,
    as the authors halve theirs.

    Args:
        gradient: Of the safety objective after the fine-tuning, by the weights.
        curvature: ``v -> H v`` of the fine-tuning's own loss, there.
        proximity: > 0; a larger one lets the fine-tuning go further.
        iterations: >= 0; 0 returns ``gradient``, the first-order look-ahead.
    Source: arXiv 2507.16302, the implicit gradient of the Moreau envelope.
    """
    check_range("implicit_gradient.proximity", proximity, above=0.0)
    found = gradient
    for _ in range(iterations):
        bent = curvature(found)
        length, limit = float(bent.norm()), float(found.norm())
        if proximity * length > limit:
            proximity = limit / (2 * length)
        found = gradient - proximity * bent
    return ImplicitGradient(found, proximity)
