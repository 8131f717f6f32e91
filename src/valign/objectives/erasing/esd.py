"""Erase a concept by training towards its own negative guidance (ESD, arXiv 2303.07345)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from valign.checks import check_options, option
from valign.methods import Method

METHOD = Method(
    slug="esd",
    title="ESD: erased concepts, trained towards their own negative guidance",
    paper="arXiv 2303.07345",
    room="objectives",
    entry="valign.objectives.erasing.esd:ErasedTarget",
    fidelity="exact",
    note="the released target; which weights are trained is the recipe's",
)


@dataclass(frozen=True, kw_only=True)
class ErasedTarget:
    """``eps(c') - eta (eps(c) - eps())``: what the frozen model would answer if guided away from the concept c.

    c' is the text whose answer is moved, c itself as a rule. ``eta = 0`` is the model's own answer, so nothing would be learned.
    Works on noise and velocity predictions alike, both being affine in the noise at one noisy latent.

    Raises: ValueError for a negative or infinite ``eta``.
    """

    eta: float = option(2.0, help="strength of the negative guidance that is learned; older releases: 1", low=0)

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(
        self,
        moved: Float[Tensor, "image channel height width"],
        concept: Float[Tensor, "image channel height width"],
        empty: Float[Tensor, "image channel height width"],
    ) -> Float[Tensor, "image channel height width"]:
        return moved - self.eta * (concept - empty)
