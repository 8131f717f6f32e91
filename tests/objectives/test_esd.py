import pytest
import torch
from torch.testing import assert_close

from valign.objectives import ErasedTarget


def test_one_number_by_hand():
    # 3 - 2 (5 - 4) = 1
    moved, concept, empty = (torch.full((1, 1, 1, 1), value) for value in (3.0, 5.0, 4.0))
    assert_close(ErasedTarget()(moved, concept, empty), torch.ones(1, 1, 1, 1))


def test_without_strength_it_is_the_models_own_answer():
    moved, concept, empty = torch.randn(3, 2, 4, 3, 3)
    assert torch.equal(ErasedTarget(eta=0.0)(moved, concept, empty), moved)


def test_the_target_is_guidance_with_the_sign_turned():
    # guidance of scale s is u + s (c - u); moved = c and eta = 2 make c - 2 (c - u) = u - (c - u), scale -1
    concept, empty = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64)
    assert_close(ErasedTarget()(concept, concept, empty), empty - (concept - empty))


def test_noise_and_velocity_targets_agree():
    # v = (eps - sqrt(1 - a) x) / sqrt(a) at one x: a target in eps, turned into v, is the target of the v's
    x, *eps = torch.randn(4, 2, 4, 3, 3, dtype=torch.float64)
    as_velocity = lambda noise: (noise - 0.36**0.5 * x) / 0.64**0.5  # noqa: E731
    assert_close(as_velocity(ErasedTarget()(*eps)), ErasedTarget()(*map(as_velocity, eps)))


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_refuses_a_strength_below_zero(bad):
    with pytest.raises(ValueError, match=r"ErasedTarget\.eta must be in \[0, inf\), got"):
        ErasedTarget(eta=bad)
