"""Linearized modules: the layer itself for one layer, the tangent of an MLP, and the usual network afterwards."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from valign.checks import UserError
from valign.merging.realign import linearized


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 2))

    def forward(self, x):
        return self.mlp(self.q_proj(x))


def shifted(net, size):
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            parameter += size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(9))


def test_one_linear_layer_is_its_own_expansion():
    net = Net()
    with linearized(net, ("q_proj",)) as names:
        assert names == ["q_proj"]
        shifted(net, 1.0)
        inside = net(X)
    assert_close(inside, net(X))


def test_an_mlp_keeps_value_and_gradient_at_the_start_and_then_goes_straight():
    net = Net()
    plain = net(X)
    gradient = torch.autograd.grad(plain.square().sum(), list(net.mlp.parameters()))
    with linearized(net, ("mlp",)):
        at_start = net(X)
        assert_close(at_start, plain)
        for one, other in zip(torch.autograd.grad(at_start.square().sum(), list(net.mlp.parameters())), gradient):
            assert_close(one, other)
        hidden = net.q_proj(X).detach()
        before = [parameter.detach().clone() for parameter in net.mlp.parameters()]
        steps = [torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)) for n, parameter in enumerate(before)]
        answers = []
        for size in (0.0, 1.0, 2.0):
            with torch.no_grad():
                for parameter, start, step in zip(net.mlp.parameters(), before, steps):
                    parameter.copy_(start + size * step)
                answers.append(net.mlp(hidden))
        assert_close(answers[2] - answers[1], answers[1] - answers[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net.mlp(hidden), answers[2])  # outside, the weights count in full again


def test_refuses_names_that_no_module_has_and_restores_after_an_error():
    net = Net()
    with pytest.raises(UserError, match="must have modules named ffn, got none"), linearized(net, ("ffn",)):
        pass
    with pytest.raises(ZeroDivisionError), linearized(net, ("mlp",)):
        _ = 1 / 0
    assert "forward" not in vars(net.mlp)
