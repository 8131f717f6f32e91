import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.testing import assert_close

from valign.objectives import loser_scale

residuals = hnp.arrays("float64", (2, 12), elements=st.floats(-2, 2))


def scale_of(winner, loser, mu=0.9):
    return loser_scale(winner @ winner, winner @ loser, mu=mu)


def test_values_by_hand():
    energy = torch.tensor(2.0)
    assert_close(loser_scale(energy, torch.tensor(4.0), mu=0.9), torch.tensor(0.05))  # 0.1 * 2 / 4
    assert_close(loser_scale(energy, torch.tensor(4.0)), torch.tensor(0.05))  # 0.9 is the default
    assert loser_scale(energy, torch.tensor(0.1), mu=0.9) == 1  # 0.1 * 2 / 0.1 = 2, clamped
    assert loser_scale(energy, torch.tensor(0.0), mu=0.9) == 1
    assert loser_scale(energy, torch.tensor(-3.0), mu=0.9) == 1


@given(residuals, st.floats(0, 1))
def test_a_step_cannot_raise_the_winners_error(pair, mu):
    # In output space the step is along d_w - lam d_l, so the winner's error falls to first order iff <d_w, d_w - lam d_l> >= 0.
    winner, loser = torch.from_numpy(pair)
    assume(winner @ winner > 1e-6)
    scale = scale_of(winner, loser, mu)
    assert 0 <= scale <= 1
    assert winner @ (winner - scale * loser) >= mu * (winner @ winner) * (1 - 1e-9) - 1e-12


@given(residuals)
def test_a_stronger_safeguard_never_scales_up(pair):
    winner, loser = torch.from_numpy(pair)
    assume(winner @ winner > 1e-6)
    assert scale_of(winner, loser, 1.0) <= scale_of(winner, loser, 0.5) <= scale_of(winner, loser, 0.0)


@pytest.mark.parametrize("bad", [-0.1, 1.1])
def test_refuses_a_mu_outside_the_unit_interval(bad):
    with pytest.raises(ValueError, match=r"loser_scale\.mu must be in \[0, 1\], got"):
        loser_scale(torch.tensor(1.0), torch.tensor(1.0), mu=bad)
