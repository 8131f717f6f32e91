"""Prefer the winner's denoising over the loser's, relative to a frozen reference (Diffusion-DPO, arXiv 2311.12908)."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from valign.checks import check_options, option
from valign.methods import Method
from valign.objectives.preference.pair_errors import PairErrors

METHOD = Method(
    slug="diffusion-dpo",
    title="Diffusion-DPO: direct preference optimization of denoising errors",
    paper="arXiv 2311.12908",
    room="objectives",
    entry="valign.objectives.preference.diffusion_dpo:DiffusionDPO",
    fidelity="exact",
    note="equation 14 with a constant weight as released; hinge and IPO are further losses",
)

LossType = Literal["sigmoid", "hinge", "ipo"]


@dataclass(frozen=True, kw_only=True)
class DiffusionDPO:
    """``-log sigmoid(s)`` per pair with ``s = -(beta / 2) ((e_w - e_l) - (r_w - r_l))``; ln 2 at policy == reference.

    Equation 14 of the paper with a constant weight, its horizon T folded into beta, and a mean over the latent's elements for the
    squared norm, as in the released code. The mean hides a factor: one beta is 4 times weaker at 128x128 latents than at 64x64.

    Raises: ValueError for a beta that is not positive, an unknown loss type, a smoothing outside [0, 0.5) or without the sigmoid.
    """

    beta: float = option(
        5000.0,
        help="strength of the preference, 1 / mean squared error; 5000 in the authors' launchers, other code's may lack the half",
        above=0,
    )
    loss_type: LossType = option(
        "sigmoid", help="hinge is max(0, 1 - s); ipo is (2 s / beta - 1 / beta)^2, in squared error units", rare=True
    )
    label_smoothing: float = option(0.0, help="assumed share of pairs whose label is wrong", low=0, high=0.5, rare=True)

    def __post_init__(self) -> None:
        check_options(self)
        if self.label_smoothing == 0.5:
            raise ValueError(
                "DiffusionDPO.label_smoothing must be in [0, 0.5), got 0.5. Labels that are right half the time teach nothing."
            )
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(
                f"DiffusionDPO.label_smoothing must be 0 with {self.loss_type!r}, got {self.label_smoothing!r}. Use 'sigmoid'."
            )

    def margin(self, errors: PairErrors) -> Float[Tensor, " pair"]:
        """The implicit reward margin ``s``, dimensionless; ``s > 0`` counts as a pair rightly ranked, a tie does not."""
        return self.beta / 2 * errors.advantage

    def __call__(self, errors: PairErrors) -> Float[Tensor, " pair"]:
        margin = self.margin(errors)
        if self.loss_type == "hinge":
            return (1 - margin).relu()
        if self.loss_type == "ipo":
            return (errors.advantage - 1 / self.beta).square()
        return (1 - self.label_smoothing) * softplus(-margin) + self.label_smoothing * softplus(margin)
