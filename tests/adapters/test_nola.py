"""NOLA: the formula, the regenerated basis and its backward pass, seeds, sizes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from torch import nn
from torch.testing import assert_close

from valign.adapters import NolaConfig
from valign.adapters.nola import Basis, Combine
from valign.adapters.tuner_layer import module_seed


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_of(fan_out=6, fan_in=5, name="lin", **options):
    torch.manual_seed(0)
    options = {"r": 2, "num_basis_a": 4, "num_basis_b": 3} | options
    model = get_peft_model(nn.ModuleDict({name: nn.Linear(fan_in, fan_out)}).double(), NolaConfig(target_modules=[name], **options))
    return model, model.base_model.model[name]


def set_coefficients(layer, a, b):
    with torch.no_grad():
        layer.vtune_a["default"].copy_(a)
        layer.vtune_b["default"].copy_(b)


def explicit(layer, name, options):
    """A_0, all A_i and all B_j from the seeds, by the card's formula."""
    draws = []
    for factor, count, shape in (("A", 4, (2, 5)), ("B", 3, (6, 2)), ("A0", 1, (2, 5))):
        generator = torch.Generator().manual_seed(module_seed(options.get("seed", 0), name, factor))
        scale = math.sqrt(5) if factor == "A0" else math.sqrt(count)
        draws.append(((2 * torch.rand(count, *shape, generator=generator) - 1) / scale).double())
    return draws


@pytest.mark.parametrize("options", [{}, {"seed": 7}, {"alpha": 3.0}, {"materialize": True}])
def test_the_change_is_the_formula(options):
    _, layer = layer_of(**options)
    a, b = random(4, seed=1), random(3, seed=2)
    set_coefficients(layer, a, b)
    basis_a, basis_b, offset = explicit(layer, "lin", options)
    scale = options.get("alpha", 2.0) / 2
    down = offset[0] + torch.einsum("i,irn->rn", a, basis_a)
    expected = scale * torch.einsum("j,jmr->mr", b, basis_b) @ down
    assert_close(layer.get_delta_weight("default"), expected, atol=1e-7, rtol=1e-6)
    assert torch.linalg.matrix_rank(expected) <= 2


def test_gradients_are_inner_products_with_the_basis_and_start_with_b_alone():
    _, layer = layer_of()
    x, pull = random(3, 5, seed=3), random(3, 6, seed=4)
    (layer(x) * pull).sum().backward()
    assert torch.equal(layer.vtune_a["default"].grad, torch.zeros(4, dtype=torch.float64))
    assert layer.vtune_b["default"].grad.abs().min() > 0
    layer.zero_grad()
    a, b = random(4, seed=1), random(3, seed=2)
    set_coefficients(layer, a, b)
    (layer(x) * pull).sum().backward()
    basis_a, basis_b, offset = explicit(layer, "lin", {})
    a.requires_grad_(), b.requires_grad_()
    change = torch.einsum("j,jmr->mr", b, basis_b) @ (offset[0] + torch.einsum("i,irn->rn", a, basis_a))
    ((x @ change.T) * pull).sum().backward()
    assert_close(layer.vtune_a["default"].grad, a.grad, atol=1e-6, rtol=1e-5)
    assert_close(layer.vtune_b["default"].grad, b.grad, atol=1e-6, rtol=1e-5)


def test_affine_in_each_group_of_coefficients():
    _, layer = layer_of()
    a, b, step = random(4, seed=1), random(3, seed=2), random(3, seed=5)

    def delta(a, b):
        set_coefficients(layer, a, b)
        return layer.get_delta_weight("default")

    assert_close(delta(a, b + 2 * step), delta(a, b) + 2 * delta(a, step))
    move = random(4, seed=6)
    assert_close(delta(a + 2 * move, b) - delta(a, b), 2 * (delta(a + move, b) - delta(a, b)))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**63 - 1))
def test_chunks_do_not_change_the_basis(count, size, seed):
    basis = Basis(seed, count, (3, 4))
    whole = torch.cat(list(basis.chunks()))
    assert torch.equal(torch.cat(list(basis.chunks(size))), whole)
    assert whole.abs().max() <= 1 / math.sqrt(count)
    assert torch.equal(basis.draw(1), whole[:1])


def test_large_factors_are_drawn_in_chunks_with_the_same_result(monkeypatch):
    basis, coefficients = Basis(3, 7, (4, 5)), random(7).requires_grad_()
    results = []
    for chunk in (10**6, 1, 45):
        monkeypatch.setattr("valign.adapters.nola.CHUNK", chunk)
        total = Combine.apply(coefficients, basis)
        (gradient,) = torch.autograd.grad((total * random(4, 5, seed=1)).sum(), coefficients)
        results.append((total, gradient))
    for total, gradient in results[1:]:
        assert_close(total, results[0][0], atol=1e-14, rtol=1e-13)
        assert_close(gradient, results[0][1], atol=1e-14, rtol=1e-13)
    assert torch.autograd.gradcheck(lambda c: Combine.apply(c, basis), coefficients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_cast_after_combining(dtype):
    basis, coefficients = Basis(3, 200, (4, 5)), random(200).to(dtype).requires_grad_()
    wide = coefficients.detach().float().requires_grad_()
    total, expected = Combine.apply(coefficients, basis), Combine.apply(wide, basis)
    assert total.dtype == dtype
    assert torch.equal(total, expected.to(dtype))
    pull = random(4, 5, seed=1).to(dtype)
    (total * pull).sum().backward()
    (expected * pull.float()).sum().backward()
    assert torch.equal(coefficients.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("materialize", [False, True])
def test_autocast_leaves_the_sums_in_float32(materialize):
    _, layer = layer_of(materialize=materialize)
    layer.float()
    set_coefficients(layer, random(4), random(3))
    plain = layer.factors("default")
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer.factors("default")
    assert torch.equal(cast.down, plain.down)
    assert torch.equal(cast.up, plain.up)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_written_in_half_precision_is_known_again(dtype):
    model, layer = layer_of()
    set_coefficients(layer, random(4), random(3))
    other, loaded = layer_of()
    set_peft_model_state_dict(other, get_peft_model_state_dict(model.to(dtype)))
    assert_close(loaded.vtune_a["default"].detach(), random(4), atol=0, rtol=0.01)


def test_the_global_generator_is_left_alone():
    model, layer = layer_of()
    state = torch.get_rng_state()
    get_peft_model(nn.ModuleDict({"lin": model.base_model.model["lin"].base_layer}), NolaConfig(target_modules=["lin"]))
    layer(random(2, 5)).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_every_module_and_factor_has_a_seed_of_its_own():
    _, layer = layer_of()
    _, other = layer_of(name="other")
    a, b = layer.bases["default"]
    assert len({a.seed, b.seed, *(basis.seed for basis in other.bases["default"])}) == 4


def test_other_random_matrices_are_refused():
    model, _ = layer_of(seed=0)
    other, _ = layer_of(seed=1)
    with pytest.raises(ValueError, match="lin must draw the random matrices that the adapter was trained with, got others"):
        set_peft_model_state_dict(other, get_peft_model_state_dict(model))


def test_enough_coefficients_reach_any_factor():
    """num_basis_a >= r fan_in: A_eff is any matrix, so that NOLA becomes LoRA."""
    _, layer = layer_of(num_basis_a=12)
    offset = layer.vtune_offset["default"]
    basis = layer.bases["default"][0].draw().double()
    target = random(2, 5, seed=8)
    a = torch.linalg.lstsq(basis.flatten(1).T, (target - offset).flatten()[:, None]).solution[:, 0]
    set_coefficients(layer, a, torch.zeros(3))
    assert_close(layer.factors("default").down.detach(), target, atol=1e-6, rtol=1e-5)


def test_more_coefficients_fit_better_below_the_size_of_a_rank_1_lora():
    """32 x 32, r = 4; rank-1 LoRA has 64 numbers. Measured 0.53 -> 0.52, 0.36, 0.30 for 16, 48, 62 numbers."""
    target = random(32, 1, seed=10) @ random(1, 32, seed=11) / 32
    x = torch.eye(32, dtype=torch.float64)
    losses = [(target.square().sum() / 2).item()]
    for k in (8, 24, 31):
        _, layer = layer_of(32, 32, r=4, num_basis_a=k, num_basis_b=k, materialize=True)
        optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (layer(x) - layer.base_layer(x) - target.T).square().sum() / 2
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


def test_dropout_is_on_the_input_of_the_change_in_training_only():
    _, layer = layer_of(dropout=1.0)
    set_coefficients(layer, random(4), random(3))
    x = random(2, 5)
    assert torch.equal(layer.train()(x), layer.base_layer(x))
    assert (layer.eval()(x) - layer.base_layer(x)).abs().max() > 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, r"NolaConfig\.r must be in \[1, inf\), got 0"),
        ({"num_basis_a": 0}, r"NolaConfig\.num_basis_a must be in \[1"),
        ({"num_basis_b": 0}, r"NolaConfig\.num_basis_b must be in \[1"),
        ({"alpha": 0.0}, r"NolaConfig\.alpha must be in \(0"),
        ({"seed": -1}, r"NolaConfig\.seed must be in \[0"),
        ({"seed": 2**63}, r"NolaConfig\.seed must be in \[0"),
        ({"dropout": 1.5}, r"NolaConfig\.dropout must be in \[0, 1\]"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        NolaConfig(**options)


def test_a_rank_above_the_weight_warns():
    with pytest.warns(UserWarning, match=r"NolaConfig\.r is 9, above the smaller side of lin \(6 x 5\)"):
        layer_of(r=9)
