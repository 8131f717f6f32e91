"""Unsafe captions and images moved onto their safe counterparts, safe ones held where they were (Safe-CLIP, arXiv 2311.16254)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from valign.checks import check_options, option
from valign.methods import Method
from valign.objectives.hyperbolic.quadruples import QuadrupleEmbeddings, matched_pairs

METHOD = Method(
    slug="safe-clip",
    title="Safe-CLIP's redirection: unsafe embeddings are moved onto safe ones",
    paper="arXiv 2311.16254",
    room="objectives",
    entry="valign.objectives.hyperbolic.safe_redirection:SafeRedirection",
    fidelity="variant",
    note="the four kinds of losses as the paper describes them, with equal weights; its code was not read",
)


@dataclass(frozen=True, kw_only=True)
class SafeRedirection:
    """Contrasts with the frozen encoders of the other modality, and cosines with the frozen encoder of the same one.

    For captions: unsafe ones against the safe images and onto the safe captions (redirection), safe ones against the safe images
    and onto themselves (preservation); for images likewise.
    """

    redirection_weight: float = option(1.0, help="of the losses that move unsafe content", low=0)

    def __post_init__(self) -> None:
        check_options(self)

    def terms(
        self, e: QuadrupleEmbeddings, frozen: QuadrupleEmbeddings, scale: float | Float[Tensor, ""]
    ) -> dict[str, Float[Tensor, ""]]:
        """Every loss by name, unweighted. Args: frozen: The same rows by the encoders before training."""
        if e.safe_image is None or e.unsafe_image is None or frozen.safe_image is None:
            raise ValueError("SafeRedirection needs images, got captions alone. Give quadruples with images.")
        text, image = frozen.safe_text, frozen.safe_image
        return {
            "redirect_text": _contrast(e.unsafe_text, image, scale),
            "redirect_text_cosine": _apart(e.unsafe_text, text),
            "redirect_image": _contrast(e.unsafe_image, text, scale),
            "redirect_image_cosine": _apart(e.unsafe_image, image),
            "keep_text": _contrast(e.safe_text, image, scale),
            "keep_text_cosine": _apart(e.safe_text, text),
            "keep_image": _contrast(e.safe_image, text, scale),
            "keep_image_cosine": _apart(e.safe_image, image),
        }

    def total(self, terms: dict[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """The weighted sum of `terms`."""
        parts = [(self.redirection_weight if name.startswith("redirect") else 1.0) * value for name, value in terms.items()]
        return sum(parts, start=parts[0].new_zeros(()))


def _contrast(left: Float[Tensor, "row dim"], right: Float[Tensor, "row dim"], scale: float | Float[Tensor, ""]) -> Tensor:
    return matched_pairs(scale * normalize(left, dim=-1) @ normalize(right, dim=-1).T)


def _apart(left: Float[Tensor, "row dim"], right: Float[Tensor, "row dim"]) -> Tensor:
    return (1 - cosine_similarity(left, right, dim=-1)).mean()
