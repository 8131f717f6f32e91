"""Hold the winner's denoising error below the reference, push the loser's above, each to its margin (LiVO, arXiv 2410.12700)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from valign.checks import check_options, option
from valign.methods import Method
from valign.objectives.preference.pair_errors import PairErrors

METHOD = Method(
    slug="livo",
    title="LiVO: two hinges on denoising errors, for a value encoder beside a frozen model",
    paper="arXiv 2410.12700",
    room="objectives",
    entry="valign.objectives.preference.livo:LiVO",
    fidelity="exact",
    note="the released hinges and the margins of the authors' recipe",
)


@dataclass(frozen=True, kw_only=True)
class LiVO:
    """``relu(gamma_win + beta (e_w - r_w)) + relu(gamma_lose + alpha (r_l - e_l))``; gamma_win + gamma_lose at policy == reference.

    The winner's hinge rests once ``e_w <= r_w - gamma_win / beta``, the loser's once ``e_l >= r_l + gamma_lose / alpha``, so
    nothing is gained by breaking the loser further. It bounds the joint hinge of the Bradley-Terry model from above. The defaults
    are the authors' recipe, not the placeholders (0.1) of their argument parser; both margins are then 1e-3 in squared error.

    Raises: ValueError for a slope that is not positive, or a margin below 0.
    """

    beta: float = option(1000.0, help="slope on the winner, 1 / mean squared error", above=0)
    alpha: float = option(500.0, help="slope on the loser, 1 / mean squared error", above=0)
    gamma_win: float = option(1.0, help="margin of the winner times beta, dimensionless", low=0, rare=True)
    gamma_lose: float = option(0.5, help="margin of the loser times alpha, dimensionless", low=0, rare=True)

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(self, errors: PairErrors) -> Float[Tensor, " pair"]:
        winner = self.gamma_win + self.beta * (errors.policy_w - errors.ref_w)
        loser = self.gamma_lose + self.alpha * (errors.ref_l - errors.policy_l)
        return winner.relu() + loser.relu()
