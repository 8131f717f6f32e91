"""Trion: the step, a full momentum that loses nothing, scales, exact resume, refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from valign.optimizers import Trion
from valign.optimizers.dct import newton_schulz, vectors
from valign.optimizers.trion import shape_scale


def weight(rows=6, columns=4, seed=0, dtype=torch.float64):
    return nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def gradients(parameter, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype) for _ in range(count)]


def run(parameter, optimizer, found):
    for gradient in found:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter


@pytest.mark.parametrize("shape", [(6, 4), (4, 7)])
def test_agrees_with_the_formulas(shape):
    ours = weight(*shape)
    found = gradients(ours, 5)
    p, left = ours.detach().clone(), shape[0] < shape[1]
    q, momentum = vectors(min(shape), "dct2", p), torch.zeros_like(p)
    for gradient in found:
        momentum = momentum + gradient
        m = momentum.T if left else momentum
        scores = (m @ q).norm(dim=0)
        kept = q[:, sorted(sorted(range(len(scores)), key=lambda j: -scores[j])[:2])]
        b = m @ kept
        m = m - 0.05 * b @ kept.T
        momentum = m.T if left else m
        update = newton_schulz(b, dtype=torch.float64) @ kept.T
        p = p * (1 - 0.02 * 0.1) - 0.02 * max(1.0, shape[0] / shape[1]) ** 0.5 * (update.T if left else update)
    run(ours, Trion([ours], rank=2, weight_decay=0.1, precision="float64"), found)
    assert_close(ours.detach(), p)


def test_the_move_is_nearly_orthogonal_and_of_the_rank():
    parameter = weight(8, 8)
    before = parameter.detach().clone()
    run(parameter, Trion([parameter], rank=3, lr=1.0, scale="none", precision="float64"), gradients(parameter, 1))
    s = torch.linalg.svdvals(before - parameter.detach())
    assert (s[:3] > 0.5).all()
    assert (s[:3] < 1.3).all()
    assert (s[3:] < 1e-9).all()


def test_what_is_not_moved_stays_in_the_momentum():
    parameter = weight()
    optimizer = Trion([parameter], rank=1, momentum=0.0, precision="float64")
    (gradient,) = gradients(parameter, 1)
    run(parameter, optimizer, [gradient])
    left = optimizer.state[parameter]["momentum"]
    scores = (gradient @ vectors(4, "dct2", gradient)).square().sum(0)
    assert_close(left.square().sum(), gradient.square().sum() - scores.max())  # only the strongest cosine was taken out


def test_other_parameters_are_adam():
    ours = nn.Parameter(torch.ones(5, dtype=torch.float64))
    theirs, found = copy.deepcopy(ours), gradients(ours, 4)
    with pytest.warns(UserWarning, match="Trion has a parameter group without a matrix"):
        run(ours, Trion([ours], rank=1), found)
    run(theirs, torch.optim.Adam([theirs], lr=3e-4, betas=(0.9, 0.95), eps=1e-10), found)
    assert_close(ours, theirs)


@pytest.mark.parametrize(("kind", "value"), [("none", 1.0), ("kj", 2.0), ("kimi", 1.6), ("dion", 2.0)])
def test_scales(kind, value):
    assert shape_scale(64, 16, kind) == pytest.approx(value)  # sqrt(64 / 16) = 2; 0.2 sqrt(64) = 1.6
    assert shape_scale(16, 64, "kj") == 1.0
    assert shape_scale(16, 64, "dion") == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_gives_the_same_bytes(dtype):
    straight = weight(dtype=dtype)
    found = gradients(straight, 6)
    run(straight, Trion([straight], rank=2), found)
    half = weight(dtype=dtype)
    first = Trion([half], rank=2)
    run(half, first, found[:3])
    again = nn.Parameter(half.detach().clone())
    second = Trion([again], rank=2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state[again]["momentum"].dtype == torch.float32
    assert torch.equal(run(again, second, found[3:]), straight)


def test_it_learns():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    optimizer = Trion(net.parameters(), rank=4, lr=0.05)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (net(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 5}, r"Trion\.rank for parameter 0 must be in \[1, 4\], got 5\. It is 6 x 4"),
        ({"lr": -1.0}, r"Trion\.lr must be in \(0, inf\), got -1"),
        ({"momentum": 1.0}, r"Trion\.momentum must be in \[0, 1\), got 1"),
        ({"adam_lr": 0.0}, r"Trion\.adam_lr must be in \(0, inf\), got 0"),
        ({"adam_betas": (0.9, 1.0)}, r"Trion\.beta2 must be in \[0, 1\), got 1"),
        ({"newton_schulz_steps": 0}, r"Trion\.newton_schulz_steps must be in \[1, inf\), got 0"),
        ({"norm": 0}, r"Trion\.norm must be one of 1, 2; got 0"),
    ],
)
def test_refuses_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        Trion([weight()], **{"rank": 2, **options})
