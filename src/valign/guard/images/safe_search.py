"""Search by prompt or image that returns the safe neighbour: an unsafe query is moved towards the root first (HySAC)."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError, check_choice, check_range
from valign.models.encoders.hyperbolic_clip import HyperbolicClip
from valign.models.hyperbolic.lorentz import distance_table
from valign.models.hyperbolic.space import Modality
from valign.models.hyperbolic.traversal import redirect

Target = Literal["text", "image"]


@dataclass(frozen=True)
class Found:
    """The nearest items of one query, nearest first, as indices; ``moved`` says that the query was redirected."""

    items: tuple[int, ...]
    distances: tuple[float, ...]
    moved: bool


@dataclass(frozen=True)
class SafeSearch:
    """An index of items of one modality.

    Args:
        items: Their points, by `HyperbolicClip.image_points` or `text_points` of this very CLIP.
        target: What they are; queries are moved to within the bound of the safe group of this modality.
        margin: Of that bound: 1 is the paper's ``b + tanh((b - 0.8) / c) + 1``, 0 the bound itself, see `GroupBounds.limit`.
        exact: See `redirect`.
    Raises: UserError without items.
    """

    clip: HyperbolicClip
    items: Float[Tensor, "item dim"]
    target: Target
    margin: float = 1.0
    exact: bool = False

    def __post_init__(self) -> None:
        check_choice("SafeSearch.target", self.target, ("text", "image"))
        check_range("SafeSearch.margin", self.margin, low=0.0, high=1.0)
        if not len(self.items):
            raise UserError("SafeSearch.items must hold at least one item, got none. Index some images or texts first.")

    def find(self, queries: Float[Tensor, "query dim"], *, top: int = 5, safe: bool = True) -> list[Found]:
        """The ``top`` nearest items of each query. Args: safe: Redirect unsafe queries; else they are looked for as they are."""
        check_range("SafeSearch.find.top", float(top), low=1.0)
        group: dict[Modality, str] = {"text": "safe_text", "image": "safe_image"}
        moved = [False] * len(queries)
        if safe:
            limit = self.clip.card.bounds.limit(group[self.target], margin=self.margin)
            found = redirect(queries, limit, self.clip.curvature, exact=self.exact)
            queries, moved = found.points, found.moved.tolist()
        nearest = distance_table(queries, self.items, self.clip.curvature).topk(min(top, len(self.items)), dim=1, largest=False)
        rows = zip(nearest.indices.tolist(), nearest.values.tolist(), moved)
        return [Found(tuple(items), tuple(distances), was) for items, distances, was in rows]
