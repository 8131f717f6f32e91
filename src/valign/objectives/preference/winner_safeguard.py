"""Scale the loser's gradient so that a step cannot raise the winner's error (Diffusion-SDPO, arXiv 2511.03317)."""

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import check_range
from valign.methods import Method

METHOD = Method(
    slug="diffusion-sdpo",
    title="Diffusion-SDPO: a safeguarded winner, by scaling the loser's gradient",
    paper="arXiv 2511.03317",
    room="objectives",
    entry="valign.objectives.preference.winner_safeguard:loser_scale",
    fidelity="exact",
    note="the released factor on the loser's gradient, in output space and of first order",
)


def loser_scale(winner_energy: Float[Tensor, ""], overlap: Float[Tensor, ""], *, mu: float = 0.9) -> Float[Tensor, ""]:
    """The factor ``lam`` in [0, 1] on the loser's gradient: 1 where the two residuals do not pull against each other.

    ``lam = clamp((1 - mu) winner_energy / overlap, 0, 1)``, or 1 if ``overlap <= 0``; first order, in output space.

    Args:
        winner_energy: ``<d_w, d_w>`` with ``d_k = prediction_k - target_k`` summed over the whole batch; scalar, >= 0.
        overlap: ``<d_w, d_l>`` over the same elements; scalar, any sign.
        mu: How much of the winner's own step the loser may not undo, [0, 1]; 0.9 in the authors' launcher, 1 silences the loser.
    """
    check_range("loser_scale.mu", mu, low=0.0, high=1.0)
    scale = ((1 - mu) * winner_energy / overlap).clamp(0, 1)
    return torch.where(overlap > 0, scale, torch.ones_like(scale))
