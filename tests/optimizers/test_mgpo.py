"""MGPO: the shift recomputed densely, its size, the frozen weight, exact resume, refusals."""

import copy

import pytest
import torch
from test_ggpo import data, layer_of, network, train
from torch import nn
from torch.testing import assert_close

from valign.checks import UserError
from valign.optimizers import MGPO, DCTAdamW, Trion
from valign.optimizers.mgpo import product_norm


def start(model=None, steps=0, kind=torch.optim.AdamW, momentum=None, **options):
    model = (model or network()).train()
    arguments = {"lr": 0.05} | ({"momentum": momentum} if momentum is not None else {})
    optimizer = kind([p for p in model.parameters() if p.requires_grad], **arguments)
    mgpo = MGPO(model, optimizer, **options)
    train(model, optimizer, steps)
    return model, optimizer, mgpo


def dense(model, optimizer):
    """``v`` as a full matrix, float64."""
    layer = layer_of(model)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    name = "exp_avg" if "exp_avg" in optimizer.state[a] else "momentum_buffer"
    m_a, m_b = (optimizer.state[p][name].double() for p in (a, b))
    return 3.0 * (m_b @ a.double() + b.double() @ m_a)


@pytest.mark.parametrize(("kind", "momentum"), [(torch.optim.AdamW, None), (torch.optim.SGD, 0.9)])
@pytest.mark.parametrize("ascent", [False, True])
def test_the_shift_is_the_formula(kind, momentum, ascent):
    model, optimizer, mgpo = start(steps=3, kind=kind, momentum=momentum, rho=0.2, ascent=ascent)
    v = dense(model, optimizer)
    factor = min(1 / (mgpo.mean["a"] + 1e-12), 10)
    eps = (1 if ascent else -1) * 0.2 * factor * v / v.norm()
    found = mgpo.shifts["a"]
    assert_close((found.up @ found.down).double(), eps.detach(), rtol=1e-4, atol=1e-6)
    assert product_norm(found.up, found.down) == pytest.approx(0.2 * factor, rel=1e-4)
    x, _ = data()
    noisy = layer_of(model)(x)
    model.eval()
    assert_close((noisy - layer_of(model)(x)).double(), x.double() @ eps.T, rtol=1e-3, atol=1e-5)


def test_the_mean_follows_the_gradients():
    sizes = []
    model = network().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)

    def note(*_):
        layer = layer_of(model)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        sizes.append((3.0 * (b.grad @ a + b @ a.grad)).norm().item())

    optimizer.register_step_pre_hook(note)
    mgpo = MGPO(model, optimizer, beta=0.75)
    train(model, optimizer, 3)
    expected = 0.75 * (0.75 * sizes[0] + 0.25 * sizes[1]) + 0.25 * sizes[2]
    assert mgpo.mean["a"] == pytest.approx(expected, rel=1e-4)


def test_the_frozen_weight_is_never_touched_and_evaluation_is_plain():
    model = network()
    weight = layer_of(model).base_layer.weight.clone()
    model, _, mgpo = start(model, steps=4, rho=1.0)
    assert torch.equal(layer_of(model).base_layer.weight, weight)
    x, _ = data()
    moved = layer_of(model)(x)
    mgpo.remove()
    assert not torch.equal(layer_of(model)(x), moved)
    plain = layer_of(model)(x)
    model.eval()
    assert torch.equal(layer_of(model)(x), plain)


def test_no_size_is_plain_lora_bit_for_bit():
    model, optimizer, _ = start(rho=0.0)
    plain = network().train()
    other = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.05)
    assert train(model, optimizer, 4) == train(plain, other, 4)


def test_the_first_step_has_no_shift():
    model, optimizer, mgpo = start(rho=1.0)
    x, _ = data()
    assert not mgpo.shifts
    assert torch.equal(layer_of(model)(x), layer_of(network().train())(x))
    train(model, optimizer, 1)
    assert mgpo.shifts


def test_the_size_of_the_shift_without_a_mean_and_with_a_small_one():
    model, optimizer, mgpo = start(steps=2, rho=0.2)
    mgpo.mean = {"a": 1e-3}
    mgpo.after_step()
    assert product_norm(mgpo.shifts["a"].up, mgpo.shifts["a"].down) == pytest.approx(10 * 0.2, rel=1e-4)
    again = MGPO(model, optimizer, rho=0.2)  # the optimizer has momentum already
    assert product_norm(again.shifts["a"].up, again.shifts["a"].down) == pytest.approx(0.2, rel=1e-4)


def test_a_last_gradient_is_momentum_too():
    model = network().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, betas=(0.0, 0.9))
    mgpo = MGPO(model, optimizer)
    train(model, optimizer, 2)
    assert mgpo.shifts
    assert list(model.state_dict()) == list(network().state_dict())


def test_resuming_gives_the_same_losses():
    model, optimizer, _ = start(rho=0.3)
    straight = train(model, optimizer, 6)
    model, optimizer, mgpo = start(rho=0.3)
    first = train(model, optimizer, 3)
    again, other, second = start(network(seed=9), rho=0.3)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second.load_state_dict(copy.deepcopy(mgpo.state_dict()))
    assert first + train(again, other, 3) == straight


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rho": -1.0}, r"MGPO\.rho must be in \[0, inf\), got -1"),
            ({"beta": 1.0}, r"MGPO\.beta must be in \[0, 1\), got 1"),
            ({"kind": torch.optim.SGD}, r"MGPO\.optimizer must keep a momentum, of \[0, 1\), got 0\. Use AdamW"),
        ],
    )
    def test_numbers_and_optimizers(self, options, message):
        with pytest.raises(ValueError, match=message):
            start(**options)

    @pytest.mark.parametrize(("kind", "options"), [(DCTAdamW, {"lr": 0.1, "weight_decay": 0.0}), (Trion, {})])
    def test_momentum_of_other_shapes(self, kind, options):
        model = network(rank=3).train()
        optimizer = kind([p for p in model.parameters() if p.requires_grad], rank=2, **options)
        MGPO(model, optimizer)
        with pytest.raises(ValueError, match=rf"must keep exp_avg or momentum_buffer .*, got {kind.__name__} without one"):
            train(model, optimizer, 1)

    def test_convolutions_and_other_modules(self):
        with pytest.raises(ValueError, match=r"MGPO must have linear layers only, got a, a Conv2d"):
            start(network(layer=nn.Conv2d(3, 3, 3)))
        with pytest.raises(UserError, match=r"MGPO: the state was saved for other modules: a, b"):
            start()[2].load_state_dict({"modules": ["b"], "mean": {}})
