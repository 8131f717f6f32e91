"""What training did to weights, on networks where it is known."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
from networks import with_lora

from valign.adapters import export_lora, initialize
from valign.evaluation.adapters.weight_change import effective_weight, linears, mean_rank, sharpness, weights_of


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def test_the_effective_weight_of_a_plain_layer_is_its_weight():
    layer = nn.Linear(6, 5)
    assert_close(effective_weight(layer, 6, layer.weight), layer.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [None, "ailora", "comp-lora"])
def test_of_an_adapted_layer_it_is_base_plus_change(method):
    model = with_lora()
    base = {name: module.base_layer.weight.detach().clone() for name, module in model.named_modules() if hasattr(module, "lora_A")}
    if method:
        initialize(model, method)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    names = [name.removeprefix("base_model.model.") for name in base]
    found, change = weights_of(model, names), export_lora(model)
    for name, weight in base.items():
        short = name.removeprefix("base_model.model.")
        assert_close(found[short], weight + change[short].delta(), rtol=1e-4, atol=1e-5)


def test_the_rank_of_the_change_is_counted_where_there_is_one():
    model = small()
    names = linears(model, ("0", "2"))
    before = weights_of(model, names)
    assert mean_rank(before, before) == 0
    after = dict(before)
    after["0"] = before["0"] + torch.outer(torch.arange(1.0, 6), torch.ones(6)) + torch.eye(5, 6)
    assert mean_rank(before, after) == 5
    after["0"] = before["0"] + torch.outer(torch.arange(1.0, 6), torch.ones(6))
    assert mean_rank(before, after) == 1


def test_linears_are_found_by_their_endings():
    assert linears(small(), ("2",)) == ["2"]
    assert linears(small(), ("1", "9")) == []


def test_sharpness_of_a_quadratic_is_its_curvature_and_leaves_the_weights():
    model = nn.Sequential(nn.Linear(40, 30, bias=False))
    names = ["0"]
    before = weights_of(model, names)
    kept = model[0].weight.detach().clone()
    target = model[0].weight.detach().clone()

    def loss():
        return float((model[0].weight - target).square().sum())

    found = sharpness(model, before, loss, ratio=0.1, draws=20, seed=0)
    assert found == pytest.approx(0.01 * float(kept.square().sum()), rel=0.05)  # E |noise|^2 = ratio^2 |W|^2
    assert torch.equal(model[0].weight, kept)
    assert sharpness(model, before, loss, ratio=0.1, draws=2, seed=0) == sharpness(model, before, loss, ratio=0.1, draws=2, seed=0)
