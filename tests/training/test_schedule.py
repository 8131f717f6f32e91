import pytest
import torch
from torch import nn
from torch.testing import assert_close

from valign.optimizers import OPTIMIZERS
from valign.training.engine.processes import flatten_gradients, spread_gradients
from valign.training.engine.schedule import Schedule, keep_peaks, set_rates
from valign.training.tasks.supervised import SupervisedConfig


def test_warm_up_is_linear_then_constant():
    schedule = Schedule(steps=9, warmup=4)
    assert [schedule.at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert Schedule(steps=9).at(0) == 1


def test_the_cosine_starts_at_the_full_rate_after_the_warm_up_and_falls_to_nothing():
    schedule = Schedule(peak=2.0, warmup=2, decay="cosine", steps=10)
    assert [schedule.at(step) for step in (0, 1, 2, 6, 10)] == pytest.approx([1, 2, 2, 1, 0])
    rates = [schedule.at(step) for step in range(2, 10)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0


def test_a_cosine_ends_at_its_floor():  # half way: the mean of 1 and 0.2
    schedule = Schedule(peak=2.0, decay="cosine", steps=10, floor=0.2)
    assert [schedule.at(step) for step in (0, 5, 10)] == pytest.approx([2, 1.2, 0.4])


def test_a_line_falls_to_its_last_step():
    assert [Schedule(steps=6, warmup=2, decay="linear").at(step) for step in range(6)] == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert Schedule(steps=1, warmup=1, decay="linear").at(0) == 1


def test_fine_tuning_is_at_its_peak_in_the_step_after_the_warm_up():
    shares = SupervisedConfig(steps=5, warmup=0.4).shares()
    assert [shares.at(step) for step in range(5)] == pytest.approx([1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])
    assert SupervisedConfig(steps=5, warmup=0.4, schedule="constant").shares().at(4) == 1


def test_a_group_has_its_peak_times_its_factor_times_the_scheduled_rate():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr, "rate": factor} for lr, factor in ((0.5, 4.0), (0.2, 1.0))]
    optimizer = torch.optim.SGD(groups)
    assert set_rates(optimizer, 0.1) == 0.1
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.1]
    for group, lr in zip(optimizer.param_groups, (0.5, 0.2), strict=True):
        group["lr"] = lr
    keep_peaks(optimizer)
    for _ in range(2):
        assert set_rates(optimizer, 0.1) == 0.05
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.02])


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
    optimizer = OPTIMIZERS[name]().build([{"params": [weight]}], [], 0.1)
    for _ in range(20):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert (weight < 3.5).all()
    assert optimizer.param_groups[0]["lr"] == 0.1
