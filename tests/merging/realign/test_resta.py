"""RESTA: task plus strength times safety, with DARE on the task."""

import pytest
import torch
from realign_data import named, tensors
from torch.testing import assert_close

from valign.merging.realign import Resta, resta

SAFETY, TASK = tensors(1), tensors(2)


def test_adds_the_safety_vector():
    for name, delta in resta(named(SAFETY), {"t": named(TASK)}, strength=0.7):
        assert_close(delta.delta(), (TASK[name] + 0.7 * SAFETY[name]).reshape(delta.shape))


def test_strength_0_is_the_fine_tuned_model():
    for name, delta in resta(named(SAFETY), {"t": named(TASK)}, strength=0.0):
        assert torch.equal(delta.delta(), TASK[name].reshape(delta.shape))


def test_dare_keeps_a_share_rescaled_and_depends_on_its_seed_alone():
    task = {"w": torch.ones(60, 60)}
    nothing = {"w": torch.zeros(60, 60)}

    def kept(seed):
        ((_, delta),) = resta(named(nothing), {"t": named(task)}, strength=0.5, density=0.25, seed=seed)
        return delta.delta()

    assert set(kept(0).unique().tolist()) == {0.0, 4.0}
    assert abs(float((kept(0) > 0).float().mean()) - 0.25) < 0.03
    assert torch.equal(kept(0), kept(0))
    assert not torch.equal(kept(0), kept(1))


def test_refuses_a_density_of_zero_and_a_negative_strength():
    with pytest.raises(ValueError, match=r"Resta\.density must be in \(0, 1"):
        Resta(density=0.0)
    with pytest.raises(ValueError, match=r"Resta\.strength must be in \[0, inf\)"):
        Resta(strength=-0.1)
