"""The way of an unsafe query back to what is safe: along its ray towards the root, up to the bound of a group (HySAC)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import asinh, isfinite, sinh, sqrt, tanh
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from valign.checks import check_choice, check_range
from valign.methods import Method
from valign.models.hyperbolic.lorentz import check_points, exp_root, exterior_angle, half_aperture, log_root, root_distance

METHOD = Method(
    slug="safety-traversal",
    title="HySAC's traversal: an unsafe query is moved towards the root, to its safe neighbours",
    paper="arXiv 2503.12127",
    room="models",
    entry="valign.models.hyperbolic.traversal:redirect",
    fidelity="exact",
    note="the released bounds and step for whole batches; `exact=True` puts the moved point at the bound itself",
)
GROUPS = ("safe_text", "safe_image", "unsafe_text", "unsafe_image")  # from the root outwards
OFFSET = 0.8  # a in ``b + tanh((b - a) / c) + 1``

Statistic = Literal["percentile", "mean"]


@dataclass(frozen=True)
class GroupBounds:
    """Distances to the root of the four groups' training embeddings, and the curvature that they belong to.

    Raises: ValueError if a group is missing or a number is not finite.
    """

    bounds: Mapping[str, float]  # by group: up to where it reaches
    curvature: float

    def __post_init__(self) -> None:
        check_range("GroupBounds.curvature", self.curvature, above=0.0)
        for name in GROUPS:
            if name not in self.bounds or not isfinite(self.bounds[name]):
                raise ValueError(
                    f"GroupBounds.bounds must have a finite distance for each of {', '.join(GROUPS)}, got "
                    f"{self.bounds.get(name, 'none')} for {name}. Measure them again on the training data."
                )

    def limit(self, group: str, *, margin: float = 1.0) -> float:
        """``tau = b + margin (tanh((b - 0.8) / c) + 1)``, a distance to the root; the paper's at margin 1, ``b`` itself at 0."""
        check_choice("GroupBounds.limit.group", group, GROUPS)
        check_range("GroupBounds.limit.margin", margin, low=0.0, high=1.0)
        bound = self.bounds[group]
        return bound + margin * (tanh((bound - OFFSET) / self.curvature) + 1)


def group_bounds(
    distances: Mapping[str, Float[np.ndarray, " item"]], curvature: float, *, statistic: Statistic = "percentile"
) -> GroupBounds:
    """Of each group the 95th percentile of its distances to the root (the released code), or the mean (a note on the paper).

    Raises: ValueError for another statistic, a group without items, or one that is missing.
    """
    check_choice("group_bounds.statistic", statistic, ("percentile", "mean"))
    empty = [name for name in GROUPS if not len(distances.get(name, ()))]
    if empty:
        raise ValueError(f"group_bounds.distances must hold items of each of {', '.join(GROUPS)}, got none of {empty[0]}.")
    measure = np.mean if statistic == "mean" else lambda row: np.percentile(row, 95)
    return GroupBounds({name: float(measure(np.asarray(distances[name], dtype=np.float64))) for name in GROUPS}, curvature)


@dataclass(frozen=True)
class Redirected:
    """Queries after traversal, and which of them were moved."""

    points: Float[Tensor, "query dim"]
    moved: Bool[Tensor, " query"]


def redirect(queries: Float[Tensor, "query dim"], limit: float, curvature: float, *, exact: bool = False) -> Redirected:
    """Move every query beyond ``limit`` back along its ray; the others stay as they are, bit for bit.

    Args:
        limit: tau, a distance to the root, above 0 (`GroupBounds.limit`).
        exact: Put the moved point at distance tau. The released code uses tau as the length of the space components, so that the
            point lies nearer, at ``asinh(sqrt(c) tau) / sqrt(c)``. Neither is beyond the limit, so a second call moves nothing.
    Raises: ValueError for a limit that is not above 0, or a query that is not finite.
    """
    check_range("redirect.limit", limit, above=0.0)
    check_points("redirect.queries", queries)
    root = sqrt(curvature)
    length = sinh(root * limit) / root if exact else limit
    norms = queries.norm(dim=-1, keepdim=True)
    slack = 1 + 1e-6  # of rounding, where a point was put at the limit itself
    moved = (root_distance(queries, curvature) > limit * slack) & (norms[:, 0] > 0)
    return Redirected(
        torch.where(moved[:, None], length * queries / norms.clamp(min=torch.finfo(norms.dtype).tiny), queries), moved
    )


def released_distance(limit: float, curvature: float) -> float:
    """Where the released code puts a moved point: its distance to the root."""
    return asinh(sqrt(curvature) * limit) / sqrt(curvature)


def way_to_root(query: Float[Tensor, " dim"], curvature: float, *, steps: int = 50) -> Float[Tensor, "steps dim"]:
    """Points from the query to the root, evenly spaced on the geodesic; the last is the root."""
    check_range("way_to_root.steps", float(steps), low=2.0)
    shares = torch.linspace(1, 0, steps, dtype=query.dtype)
    return exp_root(shares[:, None] * log_root(query, curvature), curvature)


def entailing(
    points: Float[Tensor, "point dim"],
    items: Float[Tensor, "item dim"],
    curvature: float,
    *,
    min_radius: float = 0.1,
    scale: float = 1.0,
) -> Bool[Tensor, "point item"]:
    """Which items' cones hold each point: what a reader may call it. An item at the root entails everything."""
    pairs = [
        exterior_angle(items, point.expand_as(items), curvature) <= scale * half_aperture(items, curvature, min_radius=min_radius)
        for point in points
    ]
    at_root = root_distance(items, curvature) <= 1e-6
    return torch.stack(pairs) | at_root if pairs else torch.zeros(0, len(items), dtype=torch.bool)


def order_of_groups(distances: Mapping[str, Float[np.ndarray, " item"]]) -> Sequence[str]:
    """The groups by mean distance to the root, nearest first."""
    return sorted(GROUPS, key=lambda name: float(np.mean(distances[name])))
