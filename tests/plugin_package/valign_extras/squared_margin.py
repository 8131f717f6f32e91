"""A squared distance of the advantage from a margin (IPO's form, arXiv 2310.12036)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from valign.checks import check_options, option
from valign.objectives import PairErrors


@dataclass(frozen=True, kw_only=True)
class SquaredMargin:
    """``(advantage - 1 / (2 beta))^2`` per pair."""

    beta: float = option(500.0, help="the margin is 1 / (2 beta), in mean squared error", above=0)

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, errors: PairErrors) -> Float[Tensor, " pair"]:
        return (errors.advantage - 1 / (2 * self.beta)).square()
