"""How guidance plugs into the sampler: which texts it wants answered, and how the answers are combined at each step."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

# state(step, scale, uncond, cond, *extra) -> combined answer, tensors [batch, channel, height, width]. ``step`` counts from 0,
# ``scale`` is the guidance scale. A state lives for one batch, so it may carry momentum from step to step.
GuidanceState = Callable[..., Tensor]


@runtime_checkable
class Guidance(Protocol):
    """A kind of guidance. It holds only its hyper-parameters and is shared by all batches."""

    @property
    def negative(self) -> str: ...  # text of the unconditional branch; "" is the model's own
    @property
    def texts(self) -> tuple[str, ...]: ...  # further texts, shared by all images; each costs one more U-Net evaluation a step
    def start(self) -> GuidanceState: ...


def classifier_free(
    step: int,
    scale: float,
    uncond: Float[Tensor, "batch channel height width"],
    cond: Float[Tensor, "batch channel height width"],
) -> Float[Tensor, "batch channel height width"]:
    """``uncond + scale (cond - uncond)`` (Ho and Salimans, arXiv 2207.12598, in the convention where 1 is no guidance)."""
    return uncond + scale * (cond - uncond)
