"""The Lorentz model of hyperbolic space with curvature ``-c``: distances, the maps at the root, and entailment cones.

A point is stored by its space components ``x`` alone; its time component is ``sqrt(1 / c + |x|^2)``, and the root is ``x = 0``
(Desai et al., arXiv 2304.09172). Half precision is computed in float32. ``c`` is a number or a scalar tensor, above 0.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import check_range

CLAMP = 1e-8  # of the arguments of acosh; in float32 its own precision, below which 1 + CLAMP is 1 and the gradient infinite
SMALL = 1e-5  # of cones and of the logarithm
LARGEST = 2.0**15  # of sinh in the exponential map

Curvature = float | Float[Tensor, ""]


def time_component(x: Float[Tensor, "*point dim"], c: Curvature) -> Float[Tensor, "*point"]:
    """``sqrt(1 / c + |x|^2)``."""
    x, c = _wide(x), _checked(c)
    return (1 / c + x.square().sum(-1)).sqrt()


def inner(x: Float[Tensor, "*point dim"], y: Float[Tensor, "*point dim"], c: Curvature) -> Float[Tensor, "*point"]:
    """The Lorentz inner product ``x . y - x0 y0`` of points in pairs; ``-1 / c`` of a point with itself."""
    x, y = _wide(x), _wide(y)
    return (x * y).sum(-1) - time_component(x, c) * time_component(y, c)


def inner_table(x: Float[Tensor, "row dim"], y: Float[Tensor, "column dim"], c: Curvature) -> Float[Tensor, "row column"]:
    """The Lorentz inner product of every ``x`` with every ``y``."""
    x, y = _wide(x), _wide(y)
    return x @ y.T - time_component(x, c)[:, None] * time_component(y, c)


def distance(x: Float[Tensor, "*point dim"], y: Float[Tensor, "*point dim"], c: Curvature) -> Float[Tensor, "*point"]:
    """The geodesic distance of points in pairs, ``acosh(-c <x, y>) / sqrt(c)``.

    A point's distance to itself is ``sqrt(2 * CLAMP / c)``, 1.4e-4 at ``c = 1`` in float64 and 4.9e-4 in float32.
    """
    return _arc(inner(x, y, c), c)


def distance_table(x: Float[Tensor, "row dim"], y: Float[Tensor, "column dim"], c: Curvature) -> Float[Tensor, "row column"]:
    """The geodesic distance of every ``x`` to every ``y``."""
    return _arc(inner_table(x, y, c), c)


def root_distance(x: Float[Tensor, "*point dim"], c: Curvature) -> Float[Tensor, "*point"]:
    """The distance to the root, ``asinh(sqrt(c) |x|) / sqrt(c)``."""
    root = _root(c)
    return (root * _wide(x).norm(dim=-1)).asinh() / root


def exp_root(v: Float[Tensor, "*point dim"], c: Curvature) -> Float[Tensor, "*point dim"]:
    """The exponential map at the root: the point at distance ``|v|`` in the direction of ``v``."""
    v, root = _wide(v), _root(c)
    length = root * v.norm(dim=-1, keepdim=True)
    largest = torch.tensor(LARGEST, dtype=torch.float64).asinh().item()
    return length.clamp(1e-8, largest).sinh() * v / length.clamp(min=1e-8)


def log_root(x: Float[Tensor, "*point dim"], c: Curvature) -> Float[Tensor, "*point dim"]:
    """The inverse of `exp_root`. Within 1e-5 of the root it is rounded, for acosh is clamped there."""
    x, root = _wide(x), _root(c)
    length = root * x.norm(dim=-1, keepdim=True)
    return (1 + length.square()).sqrt().clamp(min=1 + SMALL).acosh() * x / length.clamp(min=SMALL)


def half_aperture(x: Float[Tensor, "*point dim"], c: Curvature, *, min_radius: float = 0.1) -> Float[Tensor, "*point"]:
    """Half the angle of the cone of what ``x`` entails, in radians: ``asin(2 K / (sqrt(c) |x|))``, about pi / 2 near the root.

    Args: min_radius: K, the radius inside which a cone is as wide as it can be, above 0.
    Raises: ValueError for another K.
    """
    check_range("half_aperture.min_radius", min_radius, above=0.0)
    ratio = 2 * min_radius / (_root(c) * _wide(x).norm(dim=-1) + SMALL)
    return ratio.clamp(-1 + SMALL, 1 - SMALL).asin()


def exterior_angle(x: Float[Tensor, "*point dim"], y: Float[Tensor, "*point dim"], c: Curvature) -> Float[Tensor, "*point"]:
    """The angle at ``x`` between the geodesic on from the root and the one to ``y``, in radians; 0 where ``y`` lies straight on.

    ``x`` entails ``y`` where this is at most `half_aperture` of ``x``. The clamp makes 4.5e-3 the smallest angle.
    """
    z = _checked(c) * inner(x, y, c)
    above = time_component(y, c) + z * time_component(x, c)
    below = _wide(x).norm(dim=-1) * (z.square() - 1).clamp(min=SMALL).sqrt() + SMALL
    return (above / below).clamp(-1 + SMALL, 1 - SMALL).acos()


def check_points(who: str, x: Float[Tensor, "*point dim"]) -> None:
    """Raises: ValueError for NaN or infinity, which every comparison of distances would let pass."""
    if not x.isfinite().all():
        raise ValueError(f"{who} must be finite, got NaN or infinity. Look at the features that it was made from.")


def _arc(product: Tensor, c: Curvature) -> Tensor:
    least = 1 + max(CLAMP, torch.finfo(product.dtype).eps)
    return (-_checked(c) * product).clamp(min=least).acosh() / _root(c)


def _root(c: Curvature) -> float | Tensor:
    return _checked(c) ** 0.5


def _checked(c: Curvature) -> Curvature:
    check_range(
        "curvature",
        float(c.detach() if isinstance(c, Tensor) else c),
        above=0.0,
        hint="Hyperbolic space has curvature -c with c above 0.",
    )
    return c


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
