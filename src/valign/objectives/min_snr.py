"""Weight timesteps by their signal-to-noise ratio, capped (Min-SNR, arXiv 2303.09556)."""

from jaxtyping import Float
from torch import Tensor

from valign.checks import check_choice, check_range
from valign.methods import Method

METHOD = Method(
    slug="min-snr",
    title="Min-SNR: capped signal-to-noise weights over timesteps",
    paper="arXiv 2303.09556",
    room="objectives",
    entry="valign.objectives.min_snr:min_snr_weight",
    fidelity="exact",
    note="the paper's weights for noise and for velocity prediction",
)


def min_snr_weight(snr: Float[Tensor, " batch"], *, prediction: str, gamma: float = 5.0) -> Float[Tensor, " batch"]:
    """Loss weight that keeps nearly clean timesteps from dominating.

    Args:
        snr: ``alpha_bar / (1 - alpha_bar)`` at each sample's timestep; ``[batch]``, dimensionless, >= 0.
        prediction: ``"epsilon"`` divides ``min(snr, gamma)`` by ``snr``; ``"velocity"`` by ``snr + 1``.
        gamma: Cap on the ratio, dimensionless, > 0. 5 is the paper's choice.
    Returns: ``[batch]`` in (0, 1] for epsilon (its limit 1 at ``snr == 0``, not 0/0), [0, gamma/(gamma+1)] for velocity.
    Raises: ValueError if ``gamma`` is not positive and finite, or ``prediction`` is another word.
    """
    check_range("min_snr_weight.gamma", gamma, above=0.0)
    check_choice("min_snr_weight.prediction", prediction, ("epsilon", "velocity"))
    return (gamma / snr).clamp(max=1) if prediction == "epsilon" else snr.clamp(max=gamma) / (snr + 1)
