import pytest
import torch
from torch import nn
from torch.testing import assert_close

from valign.training.engine.optimization import build_optimizer, flatten_gradients, rate_at, spread_gradients
from valign.training.tasks.preference.config import PreferenceConfig


def test_warm_up_is_linear_then_constant():
    config = PreferenceConfig(learning_rate=1.0, warmup_steps=4)
    assert [rate_at(step, config) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rate_at(0, PreferenceConfig(learning_rate=1.0, warmup_steps=0)) == 1


def test_the_cosine_starts_at_the_full_rate_after_the_warm_up_and_falls_to_nothing():
    config = PreferenceConfig(learning_rate=2.0, warmup_steps=2, decay="cosine", steps=10)
    assert [rate_at(step, config) for step in (0, 1, 2, 6, 10)] == pytest.approx([1, 2, 2, 1, 0])
    rates = [rate_at(step, config) for step in range(2, 10)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0


def test_flatten_and_spread_are_inverse():
    first, second = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))
    first.grad = torch.arange(6.0).view(2, 3)
    flat = flatten_gradients([first, second], torch.tensor([7.0, 8.0]))
    assert_close(flat, torch.tensor([0.0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 7, 8]))  # a parameter without gradient counts as zero
    extra = spread_gradients([first, second], 2 * flat)
    assert_close(first.grad, 2 * torch.arange(6.0).view(2, 3))
    assert_close(extra, torch.tensor([14.0, 16.0]))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_optimizers_go_downhill_at_the_given_rate(name):
    weight = nn.Parameter(torch.full((3, 3), 5.0))
    optimizer = build_optimizer([weight], PreferenceConfig(optimizer=name, learning_rate=0.1, weight_decay=0.0))
    for _ in range(20):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert (weight < 3.5).all()
    assert optimizer.param_groups[0]["lr"] == 0.1
