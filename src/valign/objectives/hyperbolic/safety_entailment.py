"""Captions and images in the order safe text, safe image, unsafe text, unsafe image from a root (HySAC, arXiv 2503.12127)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from valign.checks import check_options, option
from valign.methods import Method
from valign.models.hyperbolic.lorentz import Curvature, distance_table, exterior_angle, half_aperture
from valign.objectives.hyperbolic.quadruples import QuadrupleEmbeddings, matched_pairs

METHOD = Method(
    slug="hysac",
    title="HySAC: a CLIP in hyperbolic space, in which safe content entails unsafe content",
    paper="arXiv 2503.12127",
    room="objectives",
    entry="valign.objectives.hyperbolic.safety_entailment:SafetyEntailment",
    fidelity="exact",
    note="the released losses and weights, without negatives of other processes as there; captions alone are an extension",
)


def entailment(
    wider: Float[Tensor, "row dim"], inner: Float[Tensor, "row dim"], c: Curvature, *, min_radius: float = 0.1, scale: float = 1.0
) -> Float[Tensor, ""]:
    """How far ``inner`` lies outside the cones of ``wider``, in radians: mean of ``max(0, angle - scale * half_aperture)``."""
    outside = exterior_angle(wider, inner, c) - scale * half_aperture(wider, c, min_radius=min_radius)
    return outside.relu().mean()


def contrast(
    left: Float[Tensor, "row dim"], right: Float[Tensor, "row dim"], scale: float | Float[Tensor, ""], c: Curvature
) -> Float[Tensor, ""]:
    """Symmetric cross-entropy of ``-scale * distance``, row ``i`` of one side against all of the other."""
    return matched_pairs(-scale * distance_table(left, right, c))


@dataclass(frozen=True, kw_only=True)
class SafetyEntailment:
    """``1/7 sum_i (lambda_i / sum lambda) L_i`` over four contrasts and the chain of safe text, safe image, unsafe text and image.

    The authors divide by the number of terms and by the sum of the weights: at weights of 1 by 49. With captions alone the terms
    are the contrast and the entailment of safe and unsafe ones.

    Raises: ValueError for a weight, radius or scale out of range.
    """

    entailment_weight: float = option(1.0, help="of the three entailment losses against the four contrastive ones", low=0)
    within_weight: float = option(
        0.0, help="of two more: safe captions entail unsafe ones, and safe images unsafe ones; 0 as released leaves them out", low=0
    )
    min_radius: float = option(0.1, help="K, radius within which a cone is as wide as it can be", above=0)
    aperture_scale: float = option(1.0, help="factor on the half-aperture of cones", above=0)

    def __post_init__(self) -> None:
        check_options(self)

    def terms(self, e: QuadrupleEmbeddings, scale: float | Float[Tensor, ""], c: Curvature) -> dict[str, Float[Tensor, ""]]:
        """Every loss by name, unweighted.

        Args: scale: ``exp(logit_scale)``, above 0. c: Curvature is ``-c``.
        """
        if e.safe_image is None or e.unsafe_image is None:
            return {
                "safe_text~unsafe_text": contrast(e.safe_text, e.unsafe_text, scale, c),
                "safe_text>unsafe_text": self._entails(e.safe_text, e.unsafe_text, c),
            }
        within = {
            "safe_text>>unsafe_text": (e.safe_text, e.unsafe_text),
            "safe_image>>unsafe_image": (e.safe_image, e.unsafe_image),
        }
        return {
            "safe_text~safe_image": contrast(e.safe_text, e.safe_image, scale, c),
            "unsafe_text~unsafe_image": contrast(e.unsafe_text, e.unsafe_image, scale, c),
            "safe_text~unsafe_image": contrast(e.safe_text, e.unsafe_image, scale, c),
            "unsafe_text~safe_image": contrast(e.unsafe_text, e.safe_image, scale, c),
            "safe_text>safe_image": self._entails(e.safe_text, e.safe_image, c),
            "unsafe_text>unsafe_image": self._entails(e.unsafe_text, e.unsafe_image, c),
            "safe_image>unsafe_text": self._entails(e.safe_image, e.unsafe_text, c),
            **({name: self._entails(*pair, c) for name, pair in within.items()} if self.within_weight else {}),
        }

    def total(self, terms: dict[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """The weighted mean of `terms`, divided by their number once more."""
        weights = {name: self.within_weight if ">>" in name else self.entailment_weight if ">" in name else 1.0 for name in terms}
        together = sum(weights.values()) * len(terms)
        return sum(
            (weights[name] / together * value for name, value in terms.items()), start=next(iter(terms.values())).new_zeros(())
        )

    def _entails(self, wider: Float[Tensor, "row dim"], inner: Float[Tensor, "row dim"], c: Curvature) -> Float[Tensor, ""]:
        return entailment(wider, inner, c, min_radius=self.min_radius, scale=self.aperture_scale)
