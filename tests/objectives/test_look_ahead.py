"""The implicit gradient of a look-ahead, against closed forms."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from valign.checks import UserError
from valign.objectives.robust.look_ahead import LookAhead, implicit_gradient


def quadratic(size=5, seed=0, largest=0.9):
    """A symmetric, positive definite Hessian with largest eigenvalue ``largest``, and a centre."""
    random = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(random.normal(size=(size, size)))
    hessian = basis @ np.diag(np.linspace(0.1, largest, size)) @ basis.T
    return torch.from_numpy(hessian), torch.from_numpy(random.normal(size=size))


def test_it_is_the_gradient_of_the_safety_loss_at_the_proximal_point():
    """F = (x - c)' H (x - c) / 2 and S = |x|^2 / 2: the proximal point is linear in theta, so S's gradient is known by autograd."""
    hessian, centre = quadratic()
    theta = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    proximity = 0.7
    eye = torch.eye(5, dtype=torch.float64)
    reached = torch.linalg.solve(eye + proximity * hessian, theta + proximity * hessian @ centre)
    (expected,) = torch.autograd.grad(reached.square().sum() / 2, theta)
    found = implicit_gradient(reached.detach(), lambda v: hessian @ v, proximity=proximity, iterations=200)
    assert_close(found.gradient, expected)
    assert found.proximity == proximity


def test_without_iterations_it_is_the_first_order_gradient():
    gradient = torch.tensor([1.0, -2.0])
    assert torch.equal(implicit_gradient(gradient, lambda v: 1 / 0, proximity=1.0, iterations=0).gradient, gradient)


def test_one_iteration_is_the_first_term_of_the_series():
    hessian, gradient = quadratic()
    found = implicit_gradient(gradient, lambda v: hessian @ v, proximity=0.5, iterations=1)
    assert_close(found.gradient, gradient - 0.5 * hessian @ gradient)


def test_where_it_would_grow_the_proximity_is_cut():
    hessian, gradient = quadratic(largest=40.0)
    found = implicit_gradient(gradient, lambda v: hessian @ v, proximity=1.0, iterations=300)
    assert found.proximity < 1 / 2
    expected = torch.linalg.solve(torch.eye(5, dtype=torch.float64) + found.proximity * hessian, gradient)
    assert_close(found.gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"look_ahead_share": 0.0}, r"look_ahead_share must be in \(0, 1\], got 0"),
        ({"scenarios": 0}, "scenarios must be in"),
        ({"inner_steps": ()}, "inner_steps must not be empty"),
        ({"inner_steps": (-1,)}, r"inner_steps must be in \[0, inf\), got -1"),
        ({"inner_rates": (0.0,)}, r"inner_rates must be in \(0, inf\), got 0"),
        ({"inner_ways": ("dora",)}, "inner_ways must be among lora, full, got 'dora'"),
        ({"inner_ranks": (0,)}, r"inner_ranks must be in \[1, inf\), got 0"),
        ({"implicit_steps": -1}, "implicit_steps must be in"),
    ],
)
def test_bad_options_are_refused(bad, told):
    with pytest.raises(ValueError, match=told):
        LookAhead(**bad)


def test_an_unknown_way_is_a_users_mistake():
    with pytest.raises(UserError, match="inner_ways"):
        LookAhead(inner_ways=("dora",))
