"""What a hyperbolic CLIP learns beside its encoders: curvature, a length per modality, and the sharpness of its distances."""

from collections.abc import Mapping
from math import log
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from valign.checks import check_choice, check_range
from valign.models.hyperbolic.lorentz import exp_root

Modality = Literal["text", "image"]
SHARPEST = 100.0  # exp(logit_scale) at most
SPREAD = 10.0  # the curvature stays within this factor of its start


class HyperbolicSpace(nn.Module):
    """Projected features ``f`` become points ``exp_root(exp(alpha) f)`` of curvature ``-c``; four scalars are learned.

    ``log c`` stays within a factor of 10 of its start, both ``alpha`` at or below 0, and ``exp(logit_scale)`` in [1 / 0.07, 100].
    `clamp` puts them back into these ranges, before every forward pass of a training.

    Args:
        dim: Of the features; lengths start at ``dim ** -0.5``.
        curvature: c at the start, above 0.
    """

    def __init__(self, dim: int, *, curvature: float = 1.0) -> None:
        super().__init__()
        check_range("HyperbolicSpace.dim", float(dim), low=1.0)
        check_range("HyperbolicSpace.curvature", curvature, above=0.0)
        start = -log(dim) / 2
        self.register_buffer("log_curvature_start", torch.tensor(log(curvature)))
        self.log_curvature = nn.Parameter(torch.tensor(log(curvature)))
        self.alpha_text = nn.Parameter(torch.tensor(start))
        self.alpha_image = nn.Parameter(torch.tensor(start))
        self.logit_scale = nn.Parameter(torch.tensor(log(1 / 0.07)))

    @property
    def curvature(self) -> Float[Tensor, ""]:
        return self.log_curvature.exp()

    @property
    def scale(self) -> Float[Tensor, ""]:
        """What distances are multiplied by in the contrastive losses."""
        return self.logit_scale.exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Put every scalar back into its range."""
        start = float(self.log_curvature_start)  # type: ignore[arg-type]
        self.log_curvature.clamp_(start - log(SPREAD), start + log(SPREAD))
        self.alpha_text.clamp_(max=0.0)
        self.alpha_image.clamp_(max=0.0)
        self.logit_scale.clamp_(log(1 / 0.07), log(SHARPEST))

    @torch.no_grad()
    def balance(self, text: Float[Tensor, "row dim"], image: Float[Tensor, "row dim"]) -> None:
        """Bring both modalities to the mean distance of the one that lies nearer, on these features: none starts outside the other.

        The released start gives both one factor, which does so only for a CLIP with captions and images of equal length.
        """
        means = {"text": text.norm(dim=1).mean().log(), "image": image.norm(dim=1).mean().log()}
        reach = min(float(alpha + means[name]) for name, alpha in (("text", self.alpha_text), ("image", self.alpha_image)))
        self.alpha_text.copy_(reach - means["text"])
        self.alpha_image.copy_(reach - means["image"])

    def points(self, features: Float[Tensor, "row dim"], modality: Modality) -> Float[Tensor, "row dim"]:
        """Features as points, by their space components. Not normalized before: the length of a feature is its distance."""
        check_choice("HyperbolicSpace.modality", modality, ("text", "image"))
        alpha = self.alpha_text if modality == "text" else self.alpha_image
        return exp_root(alpha.exp() * features.to(torch.promote_types(features.dtype, torch.float32)), self.curvature)

    def tensors(self) -> dict[str, Tensor]:
        """All scalars by name, for a file."""
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], dim: int) -> "HyperbolicSpace":
        """From `tensors`. Raises: RuntimeError if they are others."""
        space = cls(dim)
        space.load_state_dict(dict(tensors))
        return space.requires_grad_(False)
