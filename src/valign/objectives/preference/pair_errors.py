"""The four denoising errors that every pairwise objective is made of, and how they are formed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class PairErrors:
    """Mean squared denoising errors of the winner (w) and the loser (l), under the policy and the reference.

    Each is ``[pair]``, >= 0, in squared latent units per element (the mean over channel, height and width). Shapes must be
    equal, for broadcasting hides bugs; half precision is refused: at beta 5000 an fp16 rounding of 6e-5 moves the margin by 0.15.
    """

    policy_w: Float[Tensor, " pair"]
    policy_l: Float[Tensor, " pair"]
    ref_w: Float[Tensor, " pair"]
    ref_l: Float[Tensor, " pair"]

    def __post_init__(self) -> None:
        shapes = [tuple(error.shape) for error in self]
        if len(set(shapes)) > 1 or len(shapes[0]) != 1:
            raise ValueError(
                f"PairErrors must be four tensors of one shape [pair], got {', '.join(map(str, shapes))}. Reduce per sample."
            )
        dtypes = {error.dtype for error in self}
        if not dtypes <= {torch.float32, torch.float64}:
            raise ValueError(
                f"PairErrors must be float32 or float64, got {', '.join(sorted(map(str, dtypes)))}. Use denoising_error."
            )

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.policy_w, self.policy_l, self.ref_w, self.ref_l))

    @classmethod
    def split(cls, policy: Float[Tensor, " image"], reference: Float[Tensor, " image"]) -> PairErrors:
        """Take batches whose first half are the winners and whose second half are the losers, in the same order."""
        if policy.shape != reference.shape or len(policy) % 2:
            raise ValueError(
                f"PairErrors.split must get two batches of one even size, got {len(policy)} and {len(reference)}. "
                "The first half are the winners, the second half the losers."
            )
        return cls(*policy.chunk(2), *reference.chunk(2))

    def weighted(self, weight: Float[Tensor, " pair"]) -> PairErrors:
        """All four errors times one weight per pair, e.g. `min_snr_weight`."""
        if weight.shape != self.policy_w.shape:
            raise ValueError(f"PairErrors.weighted must get {len(self.policy_w)} weights, got {tuple(weight.shape)}. One per pair.")
        return PairErrors(*(error * weight for error in self))

    @property
    def advantage(self) -> Float[Tensor, " pair"]:
        """``(r_w - r_l) - (e_w - e_l)``: > 0 where the policy prefers the winner more than the reference does; 0 at equality."""
        return (self.ref_w - self.ref_l) - (self.policy_w - self.policy_l)


@runtime_checkable
class PairObjective(Protocol):
    """A frozen dataclass of hyper-parameters; the call is pure and unreduced: one value per pair."""

    def __call__(self, errors: PairErrors) -> Float[Tensor, " pair"]: ...


def denoising_error(
    prediction: Float[Tensor, "image channel height width"], target: Float[Tensor, "image channel height width"]
) -> Float[Tensor, " image"]:
    """Mean squared error per sample, in float32 whatever the input's precision (float64 stays)."""
    if prediction.shape != target.shape:
        raise ValueError(f"denoising_error must get equal shapes, got {tuple(prediction.shape)} and {tuple(target.shape)}.")
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return (prediction.to(wide) - target.to(wide)).square().flatten(1).mean(1)
