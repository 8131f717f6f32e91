"""LoLDU: the factorization, every start, scale, orders of pivots, what the factors reach."""

from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from valign.adapters import LolduConfig
from valign.adapters.loldu import STARTS, ldu, ldu_in_order, start_diagonal


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_of(weight, **options):
    torch.manual_seed(0)
    linear = nn.Linear(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        linear.weight.copy_(weight)
    model = get_peft_model(nn.ModuleDict({"lin": linear}), LolduConfig(target_modules=["lin"], **options))
    return model, model.base_model.model["lin"]


shapes = st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_the_factorization_and_its_repetition_in_a_given_order(shape):
    weight = random(*shape[:2], seed=shape[2])
    rank = min(weight.shape)
    for parts in (ldu(weight, rank), ldu_in_order(weight, ldu(weight, rank).rows, rank)):
        assert_close((parts.lower @ torch.diag(parts.pivots) @ parts.upper)[parts.rows], weight)
        assert parts.lower.abs().max() <= 1 + 1e-12  # partial pivoting
        assert_close(parts.lower.diagonal(), torch.ones(rank, dtype=torch.float64))
        assert_close(parts.upper.diagonal(), torch.ones(rank, dtype=torch.float64))
        assert torch.equal(parts.lower, parts.lower.tril())
        assert_close(parts.upper, parts.upper.triu(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("init", STARTS)
def test_every_start_keeps_the_function_whatever_the_scale(init):
    x = random(3, 5)
    for alpha in (None, 0.5):
        _, layer = layer_of(random(6, 5), r=4, init=init, alpha=alpha)
        assert torch.equal(layer(x), layer.base_layer(x))


def test_starts_are_what_their_names_say():
    pivots = random(4000).abs() + 0.5
    mean, spread = pivots.mean(), pivots.std()
    draw = {init: start_diagonal(pivots, init, torch.Generator().manual_seed(0)) for init in STARTS}
    assert torch.equal(draw["lu"], pivots)
    assert_close(draw["constant"], mean.expand(4000))
    assert torch.equal(draw["ones"], torch.ones(4000, dtype=torch.float64))
    assert torch.equal(draw["zeros"], torch.zeros(4000, dtype=torch.float64))
    assert draw["uniform"].abs().max() <= mean / 2
    assert_close(draw["uniform"].std(), mean / 12**0.5, rtol=0.05, atol=0)
    assert_close(draw["unit_uniform"].std(), torch.tensor(2 / 12**0.5, dtype=torch.float64), rtol=0.05, atol=0)
    assert_close(draw["normal"].mean(), mean, rtol=0.05, atol=0)
    assert_close(draw["normal"].std(), spread, rtol=0.05, atol=0)
    assert_close(draw["unit_normal"].std(), torch.tensor(1.0, dtype=torch.float64), rtol=0.05, atol=0)
    again = start_diagonal(pivots, "normal", torch.Generator().manual_seed(0))
    assert torch.equal(again, draw["normal"])


@pytest.mark.parametrize("pivots", [[1.0, 4.0], [2.0, -1.0, 0.5, 3.5]])
def test_the_normal_start_has_the_unbiased_spread_of_the_pivots(pivots):
    found = start_diagonal(torch.tensor(pivots, dtype=torch.float64), "normal", torch.Generator().manual_seed(0))
    unit = torch.randn(len(pivots), generator=torch.Generator().manual_seed(0)).double()
    expected = [fmean(pivots) + stdev(pivots) * float(number) for number in unit]  # the standard library's, with r - 1
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_normal_start_of_one_pivot_is_the_pivot():
    found = start_diagonal(torch.tensor([3.0]), "normal", torch.Generator().manual_seed(0))
    assert found.tolist() == [3.0]


def test_full_rank_reproduces_and_removes_the_weight():
    weight = random(5, 7)
    _, layer = layer_of(weight, r=5)
    parts = ldu(weight, 5)
    assert_close(layer.vtune_diagonal["default"].detach(), parts.pivots)
    with torch.no_grad():
        layer.vtune_diagonal["default"].zero_()
    assert_close(weight + layer.get_delta_weight("default"), torch.zeros(5, 7, dtype=torch.float64), atol=1e-12, rtol=0)


@settings(max_examples=15, deadline=None)
@given(shapes, st.floats(0.1, 5), st.data())
def test_the_change_is_the_formula(shape, alpha, data):
    weight = random(*shape[:2], seed=shape[2])
    rank = data.draw(st.integers(1, min(weight.shape)))
    _, layer = layer_of(weight, r=rank, alpha=alpha)
    z = random(rank, seed=5)
    with torch.no_grad():
        layer.vtune_diagonal["default"].copy_(z)
    permutation, lower, upper = torch.linalg.lu(weight)
    pivots = upper.diagonal()[:rank]
    expected = alpha / rank * permutation @ lower[:, :rank] @ torch.diag(z - pivots) @ (upper[:rank] / pivots[:, None])
    delta = layer.get_delta_weight("default")
    assert_close(delta, expected)
    assert torch.linalg.matrix_rank(delta) <= rank


def test_gradient():
    weight, x, pull = random(6, 5), random(3, 5, seed=1), random(3, 6, seed=2)
    _, layer = layer_of(weight, r=3, alpha=1.5)
    (layer(x) * pull).sum().backward()
    permutation, lower, upper = torch.linalg.lu(weight)
    inside = (permutation @ lower)[:, :3].T @ (pull.T @ x) @ (upper[:3] / upper.diagonal()[:3, None]).T
    assert_close(layer.vtune_diagonal["default"].grad, 0.5 * inside.diagonal())


def test_a_trained_scale():
    weight = random(6, 5)
    model, layer = layer_of(weight, r=3, alpha=1.5, train_sigma=True)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 4
    assert torch.equal(layer(random(2, 5)), layer.base_layer(random(2, 5)))
    with torch.no_grad():
        layer.vtune_sigma["default"].fill_(0.8)
    parts = ldu(weight, 3)
    expected = parts.lower[parts.rows] @ torch.diag((0.8 - 0.5) * parts.pivots) @ parts.upper
    assert_close(layer.get_delta_weight("default"), expected)
    state = get_peft_model_state_dict(model)
    other, loaded = layer_of(weight, r=3, alpha=1.5, train_sigma=True)
    set_peft_model_state_dict(other, state)
    assert torch.equal(loaded.get_delta_weight("default"), layer.get_delta_weight("default"))


def test_an_adapter_of_a_machine_that_pivots_otherwise():
    weight = random(6, 5)
    rows = torch.tensor([2, 0, 5, 1, 4, 3])
    parts = ldu_in_order(weight, rows, 5)
    assert_close((parts.lower @ torch.diag(parts.pivots) @ parts.upper)[rows], weight)
    model, layer = layer_of(weight, r=3)
    assert not torch.equal(layer.vtune_rows["default"].long(), rows)
    state = get_peft_model_state_dict(model)
    z = parts.pivots[:3] * 1.5
    stem = "base_model.model.lin."
    state |= {f"{stem}vtune_rows": rows.int(), f"{stem}vtune_start": parts.pivots[:3], f"{stem}vtune_diagonal": z}
    set_peft_model_state_dict(model, state)
    expected = parts.lower[rows][:, :3] @ torch.diag(0.5 * parts.pivots[:3]) @ parts.upper[:3]
    assert_close(layer.get_delta_weight("default"), expected)
    state[f"{stem}vtune_rows"] = torch.tensor([0, 0, 1, 2, 3, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="lin must be saved with a permutation of 6 rows"):
        set_peft_model_state_dict(model, state)


def test_random_starts_depend_on_seed_and_module_alone():
    weight = random(6, 5)
    starts = [layer_of(weight, r=3, init="uniform", seed=seed)[1].vtune_start["default"] for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_convolutions_are_matrices():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1).double()
    model = get_peft_model(nn.ModuleDict({"conv": conv}), LolduConfig(target_modules=["conv"], r=4, convs=True))
    layer, x = model.base_model.model["conv"], random(2, 3, 8, 8)
    assert torch.equal(layer(x), conv(x))
    with torch.no_grad():
        layer.vtune_diagonal["default"].mul_(1.5)
    parts = ldu(conv.weight.detach().flatten(1), 4)
    delta = (parts.lower @ torch.diag(0.5 * parts.pivots) @ parts.upper)[parts.rows].view(5, 3, 3, 3)
    assert_close(layer.get_delta_weight("default"), delta)
    adapter = layer(x)
    assert_close(adapter, conv(x) + F.conv2d(x, delta, stride=2, padding=1))
    layer.merge()
    assert_close(layer(x), adapter)


def test_its_factors_reach_what_random_factors_cannot():
    """Target P L diag(D c) U: least squares in 16 numbers is exact with the LDU factors, far off with random ones of equal norm."""
    weight = random(16, 16)
    parts = ldu(weight, 16)
    target = parts.lower[parts.rows] @ torch.diag(parts.pivots * (0.5 + random(16, seed=1).abs())) @ parts.upper
    _, layer = layer_of(weight, r=16)
    for ours in (True, False):
        up, down = layer.vtune_up["default"], layer.vtune_down["default"]
        if not ours:
            up, down = (r * (f.norm() / r.norm()) for f, r in ((up, random(16, 16, seed=2)), (down, random(16, 16, seed=3))))
        terms = torch.einsum("oi,in->ion", up, down).flatten(1).T
        goal = (target - weight).flatten()[:, None]
        left = (terms @ torch.linalg.lstsq(terms, goal).solution - goal).square().mean() / goal.square().mean()
        assert left < 1e-18 if ours else left > 0.5


@pytest.mark.parametrize(
    ("weight", "options", "match"),
    [
        (random(5, 4), {"r": 0}, r"LolduConfig\.r must be in \[1, inf\), got 0"),
        (random(5, 4), {"r": 5}, r"LolduConfig\.r must be in \[1, 4\], got 5\. lin is \(5, 4\)"),
        (random(5, 4), {"r": 2, "alpha": 0.0}, r"LolduConfig\.alpha must be in \(0, inf\), got 0\.0"),
        (random(5, 4), {"r": 2, "seed": -1}, r"LolduConfig\.seed must be in \[0, "),
        (torch.ones(4, 4, dtype=torch.float64), {"r": 2}, "lin must have 2 leading pivots that are not 0, got 0 as number 2"),
        (torch.tensor([[1e-9, 1.0], [0.0, 1.0]]).double(), {"r": 1}, "1 leading pivots that are not 0, got 1e-09 as number 1"),
        (torch.zeros(4, 4, dtype=torch.float64), {"r": 1}, "lin must have 1 leading pivots that are not 0, got 0 as number 1"),
    ],
)
def test_bad_input(weight, options, match):
    with pytest.raises(ValueError, match=match):
        layer_of(weight, **options)


def test_an_unknown_start():
    config = LolduConfig()
    config.init = "lu2"
    with pytest.raises(ValueError, match=r"LolduConfig\.init must be one of lu, uniform"):
        config.__post_init__()
