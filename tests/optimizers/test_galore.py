"""GaLore: its formulas, AdamW at full rank in the rotated frame, memory, exact resume, refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from valign.optimizers import GaLore


def weight(rows=6, columns=4, seed=0):
    return nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def gradients(parameter, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(parameter.shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def run(parameter, optimizer, found):
    for gradient in found:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter


@pytest.mark.parametrize("shape", [(6, 4), (4, 7)])
def test_agrees_with_the_formulas(shape):
    ours = weight(*shape)
    found, left = gradients(ours, 5), shape[0] < shape[1]
    p, first, second = ours.detach().clone(), 0.0, 0.0
    for step, gradient in enumerate(found, start=1):
        g = gradient.T if left else gradient
        if step in (1, 4):
            kept = torch.linalg.svd(g, full_matrices=False).Vh[:2].T
        a = g @ kept
        first, second = 0.9 * first + 0.1 * a, 0.999 * second + 0.001 * a**2
        u = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        move = 0.25 * u @ kept.T
        p = p * (1 - 0.02 * 0.1) - 0.02 * (move.T if left else move)
    run(ours, GaLore([ours], rank=2, lr=0.02, weight_decay=0.1, update_every=3), found)
    assert_close(ours.detach(), p)


def test_at_full_rank_it_is_adam_in_the_frame_of_the_first_gradient():
    ours, found = weight(5, 5), gradients(weight(5, 5), 6)
    frame = torch.linalg.svd(found[0]).Vh.T
    turned = nn.Parameter(ours.detach() @ frame)
    run(ours, GaLore([ours], rank=5, lr=0.1, scale=1.0), found)
    run(turned, torch.optim.Adam([turned], lr=0.1), [gradient @ frame for gradient in found])
    assert_close(ours.detach() @ frame, turned.detach())


def test_a_move_has_the_rank():
    parameter = weight(8, 8)
    before = parameter.detach().clone()
    run(parameter, GaLore([parameter], rank=3, lr=1.0), gradients(parameter, 1))
    assert torch.linalg.matrix_rank(before - parameter.detach()) == 3


def test_state_is_two_thin_moments_and_the_projection():
    parameter = weight(40, 10)
    optimizer = GaLore([parameter], rank=2, lr=0.1)
    run(parameter, optimizer, gradients(parameter, 2))
    sizes = {name: tuple(value.shape) for name, value in optimizer.state[parameter].items() if name != "step"}
    assert sizes == {"projection": (10, 2), "exp_avg": (40, 2), "exp_avg_sq": (40, 2)}


def test_resumes_to_the_same_bytes():
    straight, found = weight(), gradients(weight(), 9)
    run(straight, GaLore([straight], rank=2, lr=0.1, update_every=4), found)
    half = weight()
    optimizer = GaLore([half], rank=2, lr=0.1, update_every=4)
    run(half, optimizer, found[:5])
    saved, resumed = copy.deepcopy(optimizer.state_dict()), nn.Parameter(half.detach().clone())
    again = GaLore([resumed], rank=2, lr=0.1, update_every=4)
    again.load_state_dict(saved)
    assert torch.equal(run(resumed, again, found[5:]), straight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 9}, r"GaLore\.rank for parameter 0 must be in \[1, 4\], got 9"),
        ({"rank": 2, "update_every": 0}, r"GaLore\.update_every must be in \[1, inf\), got 0"),
        ({"rank": 2, "scale": 0.0}, r"GaLore\.scale must be in \(0, inf\), got 0"),
        ({"rank": 2, "side": "up"}, r"GaLore\.side must be one of auto, left, right; got 'up'"),
    ],
)
def test_refuses_what_cannot_be(options, message, as_in_use):
    with pytest.raises(ValueError, match=message):
        GaLore([weight()], lr=0.1, **options)
