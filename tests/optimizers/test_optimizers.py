"""What every optimizer and perturbation in the tables promises."""

import pytest
import torch
from torch import nn

from valign.methods import declared_methods
from valign.optimizers import OPTIMIZERS, PERTURBATIONS, DCTAdamW, GaLore, Trion

KINDS = {"dct-adamw": DCTAdamW, "galore": GaLore, "trion": Trion}
OPTIONS = {"dct-adamw": {"rank": 2, "lr": 0.01, "weight_decay": 0.0}, "galore": {"rank": 2, "lr": 0.01}, "trion": {"rank": 2}}


def test_every_row_is_tried():
    assert sorted(OPTIMIZERS) == sorted(["adamw", "adafactor", "adamw-eight-bit", *KINDS])


@pytest.mark.parametrize("name", [*KINDS, *(f"lora-{name}" for name in PERTURBATIONS)])
def test_the_method_is_declared(name):
    assert name in {method.slug for method in declared_methods() if method.room == "optimizers"}


@pytest.mark.parametrize("name", KINDS)
def test_it_is_a_torch_optimizer(name):
    """Named parameters, groups with their own rate, parameters without a gradient, a closure, and gradients left as they are."""
    layer = nn.Linear(4, 5)
    idle = nn.Parameter(torch.ones(3, 3))
    groups = [{"params": [layer.weight, layer.bias], "lr": 0.5}, {"params": [idle]}]
    optimizer = KINDS[name](groups, **OPTIONS[name])
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, optimizer.defaults["lr"]]
    before = layer.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 4)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert torch.equal(idle, torch.ones(3, 3))
    assert not torch.equal(layer.weight, before)
    kept = layer.weight.grad.clone()
    optimizer.step()
    assert torch.equal(layer.weight.grad, kept)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.25
