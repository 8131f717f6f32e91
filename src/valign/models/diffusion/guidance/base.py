"""Classifier-free guidance: how the denoiser's answers with and without the prompt are combined at each step."""

from jaxtyping import Float
from torch import Tensor


def classifier_free(
    step: int,
    scale: float,
    uncond: Float[Tensor, "batch channel height width"],
    cond: Float[Tensor, "batch channel height width"],
) -> Float[Tensor, "batch channel height width"]:
    """``uncond + scale (cond - uncond)`` (Ho and Salimans, arXiv 2207.12598, in the convention where 1 means none)."""
    return uncond + scale * (cond - uncond)
