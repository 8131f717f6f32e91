"""The Lorentz model's maps against their defining equations, and the traversal against its promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from valign.models.hyperbolic.lorentz import (
    distance,
    distance_table,
    exp_root,
    exterior_angle,
    half_aperture,
    inner,
    log_root,
    root_distance,
    time_component,
)
from valign.models.hyperbolic.space import HyperbolicSpace
from valign.models.hyperbolic.traversal import (
    GROUPS,
    GroupBounds,
    entailing,
    group_bounds,
    redirect,
    released_distance,
    way_to_root,
)

CURVATURES = [0.1, 1.0, 3.7]


def points(count=6, dim=5, size=1.0, seed=0):
    return size * torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("c", CURVATURES)
def test_points_lie_on_the_hyperboloid(c):
    x = points()
    assert_close(-c * inner(x, x, c), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("c", CURVATURES)
def test_the_maps_at_the_root_are_inverse_and_keep_lengths(c):
    v = points()
    assert_close(log_root(exp_root(v, c), c), v, rtol=1e-6, atol=1e-6)
    assert_close(root_distance(exp_root(v, c), c), v.norm(dim=1))
    assert_close(distance(exp_root(v, c), torch.zeros_like(v), c), v.norm(dim=1), rtol=1e-6, atol=1e-6)


@given(st.integers(0, 1000), st.sampled_from(CURVATURES))
def test_distance_is_a_metric_up_to_its_clamp(seed, c):
    x, y, z = exp_root(points(3, seed=seed), c)[:, None]
    zero = math.sqrt(2e-8 / c)
    assert float(distance(x, x, c)[0]) == pytest.approx(zero, rel=0.05)
    assert_close(distance(x, y, c), distance(y, x, c))
    assert float(distance(x, z, c)[0]) <= float(distance(x, y, c)[0] + distance(y, z, c)[0]) + 3 * zero


def test_small_distances_are_euclidean():
    v, w = points(size=1e-2), points(size=1e-2, seed=1)
    assert_close(distance(exp_root(v, 1.0), exp_root(w, 1.0), 1.0), (v - w).norm(dim=1), rtol=1e-3, atol=0)


def test_a_table_holds_the_distances_of_all_pairs():
    x, y = points(3), points(4, seed=1)
    table = distance_table(x, y, 0.5)
    assert_close(table[2, 3], distance(x[2], y[3], 0.5))
    assert table.shape == (3, 4)


def test_the_distance_is_the_closed_form_in_two_dimensions():  # cosh d = cosh a cosh b - sinh a sinh b cos(angle), c = 1
    a, b, angle = 0.7, 1.9, 1.1
    x = exp_root(torch.tensor([a, 0.0], dtype=torch.float64), 1.0)
    y = exp_root(torch.tensor([b * math.cos(angle), b * math.sin(angle)], dtype=torch.float64), 1.0)
    expected = math.acosh(math.cosh(a) * math.cosh(b) - math.sinh(a) * math.sinh(b) * math.cos(angle))
    assert float(distance(x, y, 1.0)) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("c", CURVATURES)
def test_cones_along_a_ray(c):
    near = exp_root(torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64), c)
    far = 3 * near
    assert math.acos(1 - 1e-5) * 0.9 < float(exterior_angle(near, far, c)) < 0.02  # the clamp, and 1e-5 beside small numbers
    assert float(exterior_angle(far, near, c)) == pytest.approx(math.pi, abs=0.01)
    assert float(half_aperture(far, c)) < float(half_aperture(near, c))
    inside = torch.tensor([0.1 / math.sqrt(c), 0, 0], dtype=torch.float64)
    assert float(half_aperture(inside, c)) == pytest.approx(math.pi / 2, abs=5e-3)


def test_the_exterior_angle_is_pi_minus_the_triangles():  # hyperbolic law of cosines at the corner x of root, x, y; c = 1
    a, b, angle = 0.9, 1.6, 0.8
    x = exp_root(torch.tensor([a, 0.0], dtype=torch.float64), 1.0)
    y = exp_root(torch.tensor([b * math.cos(angle), b * math.sin(angle)], dtype=torch.float64), 1.0)
    d = float(distance(x, y, 1.0))
    at_x = math.acos((math.cosh(a) * math.cosh(d) - math.cosh(b)) / (math.sinh(a) * math.sinh(d)))
    assert float(exterior_angle(x, y, 1.0)) == pytest.approx(math.pi - at_x, abs=1e-4)


def test_half_precision_is_computed_in_float32():
    x = points().half()
    assert exp_root(x, 1.0).dtype == time_component(x, 1.0).dtype == distance(x, x, 1.0).dtype == torch.float32
    assert_close(root_distance(x, 1.0), root_distance(x.float(), 1.0))


def test_the_gradient_of_coinciding_points_is_finite():
    x = points().float().requires_grad_()
    distance_table(x, x.detach(), 1.0).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_a_curvature_that_is_not_above_0_is_refused(bad):
    with pytest.raises(ValueError, match=r"curvature must be in \(0, inf\), got"):
        root_distance(points(), bad)


def test_a_radius_that_is_not_above_0_is_refused():
    with pytest.raises(ValueError, match=r"half_aperture\.min_radius must be in \(0, inf\), got 0"):
        half_aperture(points(), 1.0, min_radius=0.0)


# ---- traversal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("c", CURVATURES)
def test_traversal_moves_only_what_lies_beyond_and_keeps_its_direction(c, exact):
    queries = torch.cat([points(20, size=0.3), points(20, size=4.0, seed=1)])
    found = redirect(queries, 1.2, c, exact=exact)
    beyond = root_distance(queries, c) > 1.2
    assert 0 < int(beyond.sum()) < 40
    assert torch.equal(found.moved, beyond)
    assert torch.equal(found.points[~beyond], queries[~beyond])
    cosine = torch.nn.functional.cosine_similarity(found.points, queries)
    assert_close(cosine, torch.ones(40, dtype=torch.float64), rtol=0, atol=1e-12)
    reached = 1.2 if exact else released_distance(1.2, c)
    assert_close(root_distance(found.points[beyond], c), torch.full((int(beyond.sum()),), reached, dtype=torch.float64))
    again = redirect(found.points, 1.2, c, exact=exact)
    assert not again.moved.any()
    assert torch.equal(again.points, found.points)


def test_the_released_step_ends_before_the_limit():  # asinh(tau) at c = 1
    assert released_distance(2.0, 1.0) == pytest.approx(1.4436354751788103)


def test_the_root_itself_stays():
    found = redirect(torch.zeros(2, 3), 0.5, 1.0)
    assert torch.equal(found.points, torch.zeros(2, 3))
    assert not found.moved.any()


def test_a_query_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"redirect\.queries must be finite, got NaN or infinity"):
        redirect(torch.tensor([[float("nan"), 1.0]]), 1.0, 1.0)


def test_the_limit_is_the_papers():
    bounds = GroupBounds(dict(zip(GROUPS, (1.0, 1.1, 1.2, 1.3))), 0.5)
    assert bounds.limit("safe_image") == pytest.approx(1.1 + math.tanh(0.3 / 0.5) + 1)
    assert bounds.limit("safe_image", margin=0.0) == 1.1


def test_bounds_are_the_95th_percentile_or_the_mean():
    rows = {name: np.arange(101.0) * (place + 1) for place, name in enumerate(GROUPS)}
    assert [group_bounds(rows, 1.0).bounds[name] for name in GROUPS] == [95.0, 190.0, 285.0, 380.0]
    assert group_bounds(rows, 1.0, statistic="mean").bounds["safe_text"] == 50.0


def test_a_missing_group_is_refused():
    rows = {name: np.ones(3) for name in GROUPS[:3]}
    with pytest.raises(ValueError, match=r"must hold items of each of .* got none of unsafe_image"):
        group_bounds(rows, 1.0)
    with pytest.raises(ValueError, match=r"must have a finite distance for each of .* got none for unsafe_image"):
        GroupBounds(dict.fromkeys(GROUPS[:3], 1.0), 1.0)


def test_the_way_to_the_root_is_evenly_spaced():
    way = way_to_root(exp_root(torch.tensor([0.6, 0.8], dtype=torch.float64), 2.0), 2.0, steps=5)
    assert_close(root_distance(way, 2.0), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64), atol=1e-6, rtol=0)


def test_what_lies_straight_on_is_entailed_and_the_root_entails_all():
    near = exp_root(torch.tensor([[0.4, 0.0], [0.0, 0.4], [0.0, 0.0]], dtype=torch.float64), 1.0)
    far = exp_root(torch.tensor([[1.5, 0.02]], dtype=torch.float64), 1.0)
    assert entailing(far, near, 1.0).tolist() == [[True, False, True]]


# ---- the learned scalars ---------------------------------------------------------------------------------------------


def test_the_scalars_start_and_stay_in_range():
    space = HyperbolicSpace(64, curvature=2.0)
    assert float(space.alpha_text) == float(space.alpha_image) == pytest.approx(math.log(64**-0.5))
    assert float(space.scale) == pytest.approx(1 / 0.07)
    with torch.no_grad():
        for parameter in space.parameters():
            parameter.add_(100.0)
    space.clamp()
    assert float(space.curvature) == pytest.approx(20.0, rel=1e-5)
    assert float(space.alpha_text) == float(space.alpha_image) == 0.0
    assert float(space.scale) == pytest.approx(100.0, rel=1e-5)
    with torch.no_grad():
        for parameter in space.parameters():
            parameter.sub_(100.0)
    space.clamp()
    assert float(space.curvature) == pytest.approx(0.2, rel=1e-5)
    assert float(space.scale) == pytest.approx(1 / 0.07, rel=1e-5)


def test_features_keep_their_length_times_the_modalitys_factor():
    space = HyperbolicSpace(16)
    features = points(4, 16).float()
    found = space.points(features, "text")
    assert_close(root_distance(found, 1.0), features.norm(dim=1) / 4, rtol=1e-5, atol=0)


def test_scalars_survive_a_file():
    space = HyperbolicSpace(16, curvature=0.3)
    again = HyperbolicSpace.of(space.tensors(), 16)
    assert float(again.curvature) == pytest.approx(0.3)
    assert not any(parameter.requires_grad for parameter in again.parameters())
