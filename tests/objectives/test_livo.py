from math import log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.testing import assert_close

from valign.objectives import OBJECTIVES, LiVO, PairErrors, denoising_error, min_snr_weight

rows = st.integers(1, 6).flatmap(lambda pairs: hnp.arrays("float64", (4, pairs), elements=st.floats(0, 2)))


def errors_of(array):
    return PairErrors(*torch.from_numpy(array))


def test_the_table_names_it():
    assert OBJECTIVES["livo"] is LiVO


def test_predictions_equal_to_the_reference_cost_both_margins():
    errors = PairErrors(*torch.rand(2, 3).repeat(2, 1))
    assert (LiVO()(errors) == 1.5).all()
    assert (LiVO(gamma_win=0.25, gamma_lose=2.0)(errors) == 2.25).all()


def test_two_pairs_by_hand():
    # pair 0: 1 + 1000 (0.1000 - 0.1004) = 0.6;  0.5 + 500 (0.200 - 0.201) = 0           -> 0.6
    # pair 1: 1 + 1000 (0.1000 - 0.1020) = -1 -> 0;  0.5 + 500 (0.2000 - 0.1996) = 0.7   -> 0.7
    table = [[0.1000, 0.1000], [0.201, 0.1996], [0.1004, 0.1020], [0.200, 0.2000]]  # e_w, e_l, r_w, r_l
    assert_close(LiVO()(PairErrors(*torch.tensor(table, dtype=torch.float64))), torch.tensor([0.6, 0.7], dtype=torch.float64))


@given(rows, st.floats(1, 5000), st.floats(1, 5000), st.floats(0, 3), st.floats(0, 3))
def test_agrees_with_the_plain_formula(array, beta, alpha, gamma_win, gamma_lose):
    e_w, e_l, r_w, r_l = array
    expected = np.maximum(0, gamma_win + beta * (e_w - r_w)) + np.maximum(0, gamma_lose + alpha * (r_l - e_l))
    loss = LiVO(beta=beta, alpha=alpha, gamma_win=gamma_win, gamma_lose=gamma_lose)(errors_of(array))
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-12, atol=1e-12)


@given(rows)
def test_bounds_the_joint_hinge_and_that_the_log_loss(array):
    e_w, e_l, r_w, r_l = array
    joint = 1.5 + 1000 * (e_w - r_w) + 500 * (r_l - e_l)  # relu(a) + relu(b) >= relu(a + b)
    assert (LiVO()(errors_of(array)).numpy() >= np.maximum(0, joint) - 1e-9).all()
    softplus = np.logaddexp(0, joint)
    assert (softplus - log(2) <= np.maximum(0, joint) + 1e-12).all()
    assert (np.maximum(0, joint) <= softplus + 1e-12).all()


@given(rows, st.floats(1, 2000), st.floats(1, 2000))
def test_gradient_by_the_errors_is_the_closed_form(array, beta, alpha):
    policy = torch.from_numpy(array[:2]).requires_grad_()
    reference = torch.from_numpy(array[2:])
    LiVO(beta=beta, alpha=alpha)(PairErrors(policy[0], policy[1], *reference)).sum().backward()
    win = ((1.0 + beta * (policy[0] - reference[0])) > 0).double() * beta
    lose = -((0.5 + alpha * (reference[1] - policy[1])) > 0).double() * alpha
    assert_close(policy.grad, torch.stack([win, lose]))


def test_gradient_by_the_prediction_is_the_closed_form():
    # d loss / d pred_w = [h1 > 0] beta 2 (pred - target) / (B C H W); for the loser minus, with alpha; 0 where a hinge rests
    generator = torch.Generator().manual_seed(0)
    shape = (4, 2, 3, 3)
    win, lose, target = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    win.requires_grad_(), lose.requires_grad_()
    e_w, e_l = denoising_error(win, target), denoising_error(lose, target)
    r_w = e_w.detach() + torch.tensor([-1e-4, 5e-3, 0.0, 1e-4])  # pair 1: the winner's hinge rests
    r_l = e_l.detach() - torch.tensor([1e-4, 0.0, 5e-3, -1e-4])  # pair 2: the loser's hinge rests
    LiVO()(PairErrors(e_w, e_l, r_w, r_l)).mean().backward()
    unit = 2 / (4 * 2 * 3 * 3)
    on_w = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64).view(4, 1, 1, 1)
    on_l = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64).view(4, 1, 1, 1)
    assert_close(win.grad, on_w * 1000 * unit * (win - target).detach())
    assert_close(lose.grad, -on_l * 500 * unit * (lose - target).detach())


@given(rows, st.floats(0, 1))
def test_a_weight_scales_the_slopes_and_not_the_margins(array, weight):
    weighted = errors_of(array).weighted(torch.full((array.shape[1],), weight, dtype=torch.float64))
    if weight > 1e-3:
        assert_close(LiVO()(weighted), LiVO(beta=1000 * weight, alpha=500 * weight)(errors_of(array)), rtol=1e-9, atol=1e-9)
    assert_close(LiVO()(errors_of(array * 0)), torch.full((array.shape[1],), 1.5, dtype=torch.float64))


def test_min_snr_weighs_all_four_errors():
    # snr 20, gamma 5: weight 1/4; 1 + 1000 (0.1 - 0.104) / 4 = 0;  0.5 + 500 (0.2 - 0.196) / 4 = 1
    errors = PairErrors(*torch.tensor([[0.1], [0.196], [0.104], [0.2]], dtype=torch.float64))
    weight = min_snr_weight(torch.tensor([20.0], dtype=torch.float64), prediction="epsilon", gamma=5.0)
    assert_close(LiVO()(errors.weighted(weight)), torch.tensor([1.0], dtype=torch.float64))


@pytest.mark.parametrize("name", ["beta", "alpha"])
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_a_slope_that_is_not_positive(name, bad):
    with pytest.raises(ValueError, match=rf"LiVO\.{name} must be in \(0, inf\), got"):
        LiVO(**{name: bad})


@pytest.mark.parametrize("name", ["gamma_win", "gamma_lose"])
def test_refuses_a_margin_below_zero(name):
    with pytest.raises(ValueError, match=rf"LiVO\.{name} must be in \[0, inf\), got -0\.1"):
        LiVO(**{name: -0.1})
