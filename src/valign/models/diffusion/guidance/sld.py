"""Safe Latent Diffusion: steer away from a safety text wherever the image leans towards it (arXiv 2211.05105). No training."""

from dataclasses import dataclass
from math import inf, isnan

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import check_choice, check_range
from valign.interfaces import GuidanceState
from valign.methods import Method

METHOD = Method(
    slug="sld",
    title="Safe Latent Diffusion",
    paper="arXiv 2211.05105",
    room="models",
    entry="valign.models.diffusion.guidance.sld:SafeLatentDiffusion",
    fidelity="exact",
    note="the paper's equations and the authors' four strengths; warm-up counts steps of a schedule of 50",
)

SAFETY_TEXT = "an image showing hate, harassment, violence, self-harm, sexual content, shocking content, illegal activity"

# The authors' four strengths; warm-up counts denoising steps of a schedule of 50.
PRESETS: dict[str, dict[str, float]] = {
    "weak": {"warmup": 15, "scale": 20.0, "threshold": 0.0, "momentum_scale": 0.0, "mom_beta": 0.0},
    "medium": {"warmup": 10, "scale": 1000.0, "threshold": 0.01, "momentum_scale": 0.3, "mom_beta": 0.4},
    "strong": {"warmup": 7, "scale": 2000.0, "threshold": 0.025, "momentum_scale": 0.5, "mom_beta": 0.7},
    "max": {"warmup": 0, "scale": 5000.0, "threshold": 1.0, "momentum_scale": 0.5, "mom_beta": 0.7},
}


@dataclass(frozen=True, kw_only=True)
class SafeLatentDiffusion:
    """Classifier-free guidance minus a term for the safety text; one more evaluation a step. Default: medium strength.

    Per latent element, with noise estimates u (unconditional), c (prompt), k (safety text) and momentum m, which starts at 0::

        s = 0 where c - k >= threshold, else min(scale |c - k|, 1)      eq. 6
        g = s (k - u) + momentum_scale m                                eqs. 4, 7
        m = mom_beta m + (1 - mom_beta) g                               eq. 8, in warm-up too
        noise = u + guidance_scale (c - u - [step >= warmup] g)         eq. 3

    ``threshold = -inf``, or k equal to u, is plain guidance. Velocity predictions are brought to noise units by the sampler.
    """

    text: str = SAFETY_TEXT
    negative: str = ""
    warmup: int = 10  # steps that only gather momentum, >= 0
    scale: float = 1000.0  # "sld_guidance_scale" of the authors' code, > 0
    threshold: float = 0.01  # in noise units
    momentum_scale: float = 0.3  # in [0, 1]
    mom_beta: float = 0.4  # in [0, 1]; 1 keeps m at 0

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("SafeLatentDiffusion.text must say what to avoid, got an empty text. Take the policy's safety_text.")
        check_range("SafeLatentDiffusion.warmup", float(self.warmup), low=0.0)
        check_range("SafeLatentDiffusion.scale", self.scale, above=0.0)
        check_range("SafeLatentDiffusion.momentum_scale", self.momentum_scale, low=0.0, high=1.0)
        check_range("SafeLatentDiffusion.mom_beta", self.mom_beta, low=0.0, high=1.0)
        if isnan(self.threshold) or self.threshold == inf:
            raise ValueError(f"SafeLatentDiffusion.threshold must be a number or -inf, got {self.threshold}.")

    @classmethod
    def preset(cls, name: str, *, text: str = SAFETY_TEXT, negative: str = "") -> "SafeLatentDiffusion":
        """The authors' ``"weak"``, ``"medium"``, ``"strong"`` or ``"max"``."""
        check_choice("SafeLatentDiffusion.preset", name, PRESETS)
        return cls(text=text, negative=negative, **PRESETS[name])  # type: ignore[arg-type]

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,)

    def start(self) -> GuidanceState:
        return SafetyMomentum(self)


class SafetyMomentum:
    """One batch's `SafeLatentDiffusion`: holds m, 0 before the first step."""

    def __init__(self, settings: SafeLatentDiffusion) -> None:
        self.settings = settings
        self.momentum: Tensor | float = 0.0

    def __call__(
        self,
        step: int,
        scale: float,
        uncond: Float[Tensor, "batch channel height width"],
        cond: Float[Tensor, "batch channel height width"],
        safety: Float[Tensor, "batch channel height width"],
    ) -> Float[Tensor, "batch channel height width"]:
        settings = self.settings
        away = (safety - uncond) * safety_scale(cond, safety, settings.scale, settings.threshold)
        away = away + settings.momentum_scale * self.momentum
        self.momentum = settings.mom_beta * self.momentum + (1 - settings.mom_beta) * away
        direction = cond - uncond
        return uncond + scale * (direction - away if step >= settings.warmup else direction)


def safety_scale(
    cond: Float[Tensor, "batch channel height width"],
    safety: Float[Tensor, "batch channel height width"],
    scale: float,
    threshold: float,
) -> Float[Tensor, "batch channel height width"]:
    """How strongly each latent element is steered away, in [0, 1] (eq. 6)."""
    lean = cond - safety
    return torch.where(lean >= threshold, 0.0, (lean.abs() * scale).clamp(max=1.0))
