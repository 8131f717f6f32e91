"""LoCA: cosine transforms in three forms, gradients of values and places, the schedule, files after a cast."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from scipy.fft import idctn
from torch import nn
from torch.testing import assert_close

from valign.adapters import LocaConfig, LocaSchedule
from valign.adapters.loca import dct2, dct_matrix, grid, idct2, spectrum


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_of(fan_out=6, fan_in=5, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"lin": nn.Linear(fan_in, fan_out)}).to(dtype)
    model = get_peft_model(model, LocaConfig(target_modules=["lin"], **({"n_coefficients": 4} | options)))
    return model, model.base_model.model["lin"]


def fill(layer, seed=1):
    with torch.no_grad():
        values = layer.vtune_coefficients["default"]
        values.copy_(random(len(values), seed=seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_transforms(rows, columns, seed):
    image = random(rows, columns, seed=seed)
    change = idct2(image)
    assert_close(change, torch.from_numpy(idctn(image.numpy(), norm="ortho")))  # scipy's
    dense = [dct_matrix(n, torch.float64, torch.device("cpu")) for n in (rows, columns)]
    assert_close(change, dense[0].T @ image @ dense[1])
    assert_close(dct2(change), image)
    assert_close(change.norm(), image.norm())  # Parseval
    assert_close(dense[0] @ dense[0].T, torch.eye(rows, dtype=torch.float64))


def test_the_first_coefficient_is_a_constant():
    values = torch.tensor([1.0, 0.0], dtype=torch.float64)
    change = idct2(spectrum(values, torch.tensor([[0, 3], [0, 2]]), (6, 5)))
    assert_close(change, torch.full((6, 5), 30**-0.5, dtype=torch.float64))


def test_coefficients_that_meet_add_up():
    values = torch.tensor([1.0, 2.0])
    assert spectrum(values, torch.tensor([[1, 1], [0, 0]]), (2, 2)).tolist() == [[0, 0], [3, 0]]


@pytest.mark.parametrize("count", [2, 25])  # rank-1 terms, or the transform
@pytest.mark.parametrize("alpha", [1.0, -0.5])
def test_the_change_is_the_formula_in_every_form(count, alpha):
    _, layer = layer_of(n_coefficients=count, alpha=alpha)
    fill(layer)
    places = layer.places("default")
    slow = spectrum(layer.vtune_coefficients["default"].detach(), places, (6, 5)).numpy()
    expected = alpha * torch.from_numpy(idctn(slow, norm="ortho"))
    assert_close(layer.get_delta_weight("default"), expected)
    assert_close(layer.factors("default").product().detach(), expected)
    x = random(3, 5, seed=2)
    assert_close(layer(x) - layer.base_layer(x), x @ expected.T)
    layer.train_only("default", "locations")
    assert_close(layer(x) - layer.base_layer(x), x @ expected.T)


def test_gradient_of_the_coefficients_in_both_phases():
    for phase in ("coefficients", "locations"):
        _, layer = layer_of(alpha=0.7)
        fill(layer)
        layer.train_only("default", phase)
        layer.vtune_coefficients["default"].requires_grad_()
        x, pull = random(3, 5, seed=2), random(3, 6, seed=3)
        (layer(x) * pull).sum().backward()
        rows, columns = layer.places("default")
        dense = [dct_matrix(n, torch.float64, torch.device("cpu")) for n in (6, 5)]
        image = dense[0] @ (0.7 * pull.T @ x) @ dense[1].T  # dL/d(delta), alpha included, in the spectrum
        assert_close(layer.vtune_coefficients["default"].grad, image[rows, columns])


def test_gradient_of_the_places_is_a_clamped_finite_difference():
    _, layer = layer_of(n_coefficients=30)  # every border is met
    fill(layer)
    with torch.no_grad():
        layer.vtune_locations["default"][:, :2] = torch.tensor([[-0.2, 1.3], [0.5, 0.5]])  # clipped: rows get no gradient
    layer.train_only("default", "locations")
    x, pull = random(3, 5, seed=2), 3 * random(3, 6, seed=3)
    (layer(x) * pull).sum().backward()
    dense = [dct_matrix(n, torch.float64, torch.device("cpu")) for n in (6, 5)]
    image = dense[0] @ (pull.T @ x) @ dense[1].T
    gradient = layer.vtune_locations["default"].grad
    clamped = 0
    for k, (row, column) in enumerate(layer.places("default").T.tolist()):
        value = layer.vtune_coefficients["default"][k].item()
        by_row = 0.5 * value * (image[min(row + 1, 5), column] - image[max(row - 1, 0), column])
        by_column = 0.5 * value * (image[row, min(column + 1, 4)] - image[row, max(column - 1, 0)])
        clamped += abs(by_row) > 1
        assert_close(gradient[0, k], 5 * by_row.clamp(-1, 1) * (k > 1))
        assert_close(gradient[1, k], 4 * by_column.clamp(-1, 1))
    assert 0 < clamped < 30


def test_places_and_the_clip_of_the_source():
    unit = torch.tensor([[0.0, 1.0, 0.5, -3.0], [0.0, 1.0, 0.5, 2.0]])
    assert grid(unit, 6, 4).tolist() == [[0, 5, 2, 0], [0, 3, 2, 3]]  # 2.5 and 1.5 go to the even neighbour
    assert grid(unit, 768, 502)[:, 1].tolist() == [766, 500]  # 0.999 * 767 = 766.2: the last row is out of reach
    assert grid(unit, 501, 502)[0, 1] == 500
    assert grid(unit, 768, 502, edge=1.0)[:, 1].tolist() == [767, 501]
    _, layer = layer_of(exact_edges=True)
    assert layer.edge["default"] == 1.0


def test_all_coefficients_span_every_matrix():
    target = random(3, 4, seed=5)
    _, layer = layer_of(3, 4, n_coefficients=12)
    places = torch.cartesian_prod(torch.arange(3), torch.arange(4)).T
    with torch.no_grad():
        layer.vtune_locations["default"].copy_(places / torch.tensor([[2.0], [3.0]]))
        layer.vtune_coefficients["default"].copy_(dct2(target)[places[0], places[1]])
    assert torch.equal(layer.places("default"), places)
    assert_close(layer.get_delta_weight("default"), target)


def run(layer, schedule, steps, optimizer):
    """Train, and say after each step what moved."""
    moved = []
    groups = {"coefficients": layer.vtune_coefficients["default"], "locations": layer.vtune_locations["default"]}
    for step in range(steps):
        before = {name: parameter.clone() for name, parameter in groups.items()}
        layer(random(3, 5))  # forward passes do not count, as they do in the source
        optimizer.zero_grad(set_to_none=False)  # a gradient of 0 would let momentum and decay move a frozen group
        (layer(random(3, 5, seed=step)) - random(3, 6, seed=100 + step)).square().sum().backward()
        optimizer.step()
        schedule.step()
        moved.append([name for name, parameter in groups.items() if not torch.equal(parameter, before[name])])
    return moved


def test_the_schedule_moves_one_group_at_a_time_also_under_momentum_and_decay():
    model, layer = layer_of()
    schedule = LocaSchedule(model, location_budget=10, coefficient_steps=2, location_steps=3)
    optimizer = torch.optim.AdamW(
        [layer.vtune_coefficients["default"], layer.vtune_locations["default"]], lr=0.05, weight_decay=0.1
    )
    a, loc = ["coefficients"], ["locations"]
    assert run(layer, schedule, 14, optimizer) == [a, a, loc, loc, loc, a, a, loc, loc, loc, a, a, a, a]


def test_step_0_trains_coefficients_even_without_turns_for_them():
    model, layer = layer_of()
    schedule = LocaSchedule(model, location_budget=3, coefficient_steps=0, location_steps=1)
    assert [schedule.phase(step) for step in range(4)] == ["coefficients", "locations", "locations", "coefficients"]
    assert layer.vtune_coefficients["default"].requires_grad
    assert not layer.vtune_locations["default"].requires_grad
    with pytest.warns(UserWarning, match="while every coefficient is 0"):
        schedule.step()


def test_peft_does_not_wake_the_frozen_group_and_a_schedule_resumes():
    model, layer = layer_of()
    fill(layer)
    schedule = LocaSchedule(model, location_budget=10, coefficient_steps=1, location_steps=2)
    schedule.step()
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    assert layer.vtune_locations["default"].requires_grad
    assert not layer.vtune_coefficients["default"].requires_grad
    other = LocaSchedule(model, location_budget=10, coefficient_steps=1, location_steps=2)
    assert not layer.vtune_locations["default"].requires_grad
    other.load_state_dict(schedule.state_dict())
    assert layer.vtune_locations["default"].requires_grad
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 8  # 2 K in a location phase


def test_saving_in_a_location_phase_saves_the_places_that_are_used():
    model, layer = layer_of(dtype=torch.float32)
    fill(layer)
    layer.train_only("default", "locations")
    with torch.no_grad():
        layer.vtune_locations["default"].copy_(torch.rand(2, 4, generator=torch.Generator().manual_seed(9)))
    state = get_peft_model_state_dict(model)
    assert torch.equal(state["base_model.model.lin.vtune_grid"].long(), layer.places("default"))


def test_half_precision_moves_no_place_and_its_file_neither():
    model, layer = layer_of(300, 200, dtype=torch.float32, n_coefficients=200)
    fill(layer)
    places, delta = layer.places("default"), layer.get_delta_weight("default")
    model.half()
    assert not torch.equal(grid(layer.vtune_locations["default"].float(), 300, 200).long(), places)  # the trap is real
    assert torch.equal(layer.places("default"), places)
    assert_close(layer.get_delta_weight("default").float(), delta, atol=1e-3, rtol=1e-2)
    other, loaded = layer_of(300, 200, dtype=torch.float32, n_coefficients=200, seed=5)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(loaded.places("default"), places)


def test_autocast_leaves_the_transforms_in_float32():
    image = random(30, 20).float()
    plain = dct2(image), idct2(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dct2(image), plain[0])
        assert torch.equal(idct2(image), plain[1])


@pytest.mark.parametrize("count", [4, 40])  # rank-1 terms, or the transform
def test_half_precision_is_transformed_in_float32(count):
    _, layer = layer_of(30, 20, dtype=torch.float32, n_coefficients=count)
    fill(layer)
    layer.half()
    assert layer.get_delta_weight("default").dtype == layer.factors("default").up.dtype == torch.float32
    values = layer.vtune_coefficients["default"].detach().double()  # rounded; all the rest is exact
    expected = idct2(spectrum(values, layer.places("default"), (30, 20)))
    assert_close(layer.get_delta_weight("default").double(), expected, atol=1e-6, rtol=1e-5)
    assert_close(layer.factors("default").product().detach().double(), expected, atol=1e-6, rtol=1e-5)
    assert layer(random(3, 20).half()).dtype == torch.float16


def test_places_of_a_larger_weight_are_refused():
    model, _ = layer_of()
    state = get_peft_model_state_dict(model)
    state["base_model.model.lin.vtune_grid"][0, 0] = 6
    with pytest.raises(ValueError, match=r"lin must be as large as the weight that the adapter was trained on, got 6 x 5"):
        set_peft_model_state_dict(model, state)


def test_learnt_places_fit_a_smooth_spectrum_better_than_random_ones():
    """24 x 24, four bumps, 12 coefficients. Measured 47.1 -> 33.9, 16.0 -> 14.1, 66.7 -> 52.2 for three seeds."""
    axis = torch.arange(24, dtype=torch.float64)
    bumps = [(4.0, 5.0), (9.0, 17.0), (18.0, 8.0), (14.0, 13.0)]
    image = sum(torch.exp(-((axis[:, None] - r) ** 2 + (axis - c) ** 2) / 8) for r, c in bumps)
    target, x = idct2(image), torch.eye(24, dtype=torch.float64)
    errors = {}
    for budget in (0, 300):
        model, layer = layer_of(24, 24, n_coefficients=12)
        schedule = LocaSchedule(model, location_budget=budget)
        groups = [
            {"params": [layer.vtune_coefficients["default"]], "lr": 5e-2},
            {"params": [layer.vtune_locations["default"]], "lr": 5e-3, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups)
        for _ in range(600):
            optimizer.zero_grad()
            error = (layer(x) - layer.base_layer(x) - target.T).square().sum()
            error.backward()
            optimizer.step()
            schedule.step()
        errors[budget] = error.item()
    assert errors[300] < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_coefficients": 0}, r"LocaConfig\.n_coefficients must be in \[1, inf\), got 0"),
        ({"n_coefficients": 31}, r"LocaConfig\.n_coefficients must be in \[1, 30\], got 31\. lin has 30 entries"),
        ({"alpha": 0.0}, r"LocaConfig\.alpha must not be 0"),
        ({"seed": -1}, r"LocaConfig\.seed must be in"),
        ({"dropout": -0.1}, r"LocaConfig\.dropout must be in \[0, 1\]"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        layer_of(**options)


@pytest.mark.parametrize("name", ["location_budget", "coefficient_steps", "location_steps"])
def test_bad_schedules(name):
    model, _ = layer_of()
    with pytest.raises(ValueError, match=rf"LocaSchedule\.{name} must be in \[0, inf\), got -1"):
        LocaSchedule(model, **{name: -1})


def test_schedules_that_cannot_work():
    model, _ = layer_of()
    with pytest.raises(ValueError, match=r"coefficient_steps \+ location_steps must be in \[1"):
        LocaSchedule(model, coefficient_steps=0, location_steps=0)
    with pytest.raises(ValueError, match="must have a LoCA adapter called 'other'"):
        LocaSchedule(model, adapter="other")
    with pytest.warns(UserWarning, match="location_budget is 1000, above all 500 steps"):
        LocaSchedule(model, total_steps=500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LocaSchedule(model, location_budget=50, total_steps=500)
