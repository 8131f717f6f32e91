"""SVFit: closed forms in float64, gradient, ranks by energy, bases that changed, ties, convolutions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from valign.adapters import SvfitConfig, lora_factors
from valign.adapters.svfit import rank_for_energy


def layer_of(weight, **options):
    """One float64 linear with this weight [out, in], adapted, and its layer."""
    torch.manual_seed(0)
    linear = nn.Linear(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        linear.weight.copy_(weight)
    model = get_peft_model(nn.ModuleDict({"lin": linear}), SvfitConfig(target_modules=["lin"], **options))
    return model, model.base_model.model["lin"]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_the_changed_weight_is_the_formula(rows, columns, data):
    rank, seed = data.draw(st.integers(1, min(rows, columns))), data.draw(st.integers(0, 99))
    weight = random(rows, columns, seed=seed)
    _, layer = layer_of(weight, r=rank)
    values = random(rank, seed=seed + 1)
    with torch.no_grad():
        layer.vtune_values["default"].copy_(values)
    u, s, vh = np.linalg.svd(weight.numpy(), full_matrices=False)  # W_e + U_r diag(s) Vh_r, the slow way
    expected = weight.numpy() - (u[:, :rank] * s[:rank]) @ vh[:rank] + (u[:, :rank] * values.numpy()) @ vh[:rank]
    delta = layer.get_delta_weight("default")
    assert_close(weight + delta, torch.from_numpy(expected), atol=1e-10, rtol=1e-10)
    move = values - torch.from_numpy(s[:rank])
    assert_close(delta.norm(), move.norm(), atol=1e-10, rtol=1e-10)
    assert_close(torch.linalg.matrix_norm(delta, 2), move.abs().max(), atol=1e-10, rtol=1e-10)


def test_each_value_that_moves_is_one_rank_and_the_lora_file_holds_it_exactly():
    weight = random(6, 5)
    model, layer = layer_of(weight, r=4)
    with torch.no_grad():
        layer.vtune_values["default"] += torch.tensor([0.0, 0.7, 0.0, -0.4], dtype=torch.float64)
    delta = layer.get_delta_weight("default")
    assert torch.linalg.matrix_rank(delta, rtol=1e-9) == 2
    lora = lora_factors(model)["lin"]
    assert lora.rank == 4
    assert_close(lora.up @ lora.down, delta, rtol=0, atol=1e-14)
    assert_close(lora.down @ lora.down.T, torch.eye(4, dtype=torch.float64))  # Vh_r; B is U_r (s - S_r)


def test_gradient_is_the_diagonal_of_the_weight_gradient_in_singular_vectors():
    weight, x, pull = random(5, 4), random(3, 4, seed=1), random(3, 5, seed=2)
    _, layer = layer_of(weight, r=3)
    (layer(x) * pull).sum().backward()
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    expected = (u.T @ (pull.T @ x) @ vh.T).diagonal()[:3]  # G = pull^T x
    assert_close(layer.vtune_values["default"].grad, expected)


def test_no_singular_values_leave_the_rest_and_all_scaled_scale_the_weight():
    weight = random(5, 4)
    _, layer = layer_of(weight, r=2)
    with torch.no_grad():
        layer.vtune_values["default"].zero_()
    rest = weight + layer.get_delta_weight("default")
    assert torch.linalg.matrix_rank(rest, rtol=1e-9) == 2
    _, whole = layer_of(weight)
    with torch.no_grad():
        whole.vtune_values["default"].mul_(1.7)
    assert len(whole.vtune_values["default"]) == 4
    assert_close(weight + whole.get_delta_weight("default"), 1.7 * weight)


def test_training_moves_the_values_alone():
    model, layer = layer_of(random(5, 4), r=2)
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    layer(random(3, 4)).square().sum().backward()
    optimizer.step()
    changed = [n for n, tensor in [*model.named_parameters(), *model.named_buffers()] if not torch.equal(tensor, before[n])]
    assert changed == ["base_model.model.lin.vtune_values.default"]


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.floats(0.01, 1), st.floats(0.01, 1))
def test_energy_is_the_smallest_rank_that_holds_it_and_grows(values, low, high):
    values = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    low, high = sorted((low, high))
    rank = rank_for_energy(values, low, 8)
    share = values.square().cumsum(0) / values.square().sum()
    assert share[rank - 1] >= low - 1e-12
    assert rank == 1 or share[rank - 2] < low
    assert rank <= rank_for_energy(values, high, 8)


def test_all_energy_is_the_numerical_rank():
    weight = random(6, 2) @ random(2, 5, seed=1)
    _, layer = layer_of(weight, energy=1.0)
    assert len(layer.vtune_values["default"]) == 2
    assert rank_for_energy(torch.tensor([3.0, 4e-8]), 1.0, 2) == 1
    assert rank_for_energy(torch.zeros(3), 0.5, 3) == 1


def test_a_rank_chosen_by_energy_is_read_from_the_file():
    """At a step of the energy another machine may count one value more; the file knows."""
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    model, layer = layer_of(weight, r=3)
    with torch.no_grad():
        layer.vtune_values["default"].add_(0.5)
    state = get_peft_model_state_dict(model)
    _, loaded = layer_of(weight, energy=0.9)  # 25 / 30 < 0.9 <= 29 / 30, so 3 of its own; then 2
    assert len(loaded.vtune_values["default"]) == 3
    other, loaded = layer_of(weight, energy=0.8)
    assert len(loaded.vtune_values["default"]) == 2
    set_peft_model_state_dict(other, state)
    assert torch.equal(loaded.get_delta_weight("default"), layer.get_delta_weight("default"))


def test_other_singular_values_and_shapes_are_refused():
    weight = random(5, 4)
    model, _ = layer_of(weight, r=2)
    state = get_peft_model_state_dict(model)
    start = state["base_model.model.lin.vtune_start"]
    for factors in ([1.01, 1.01], [1.0011, 1.0]):  # 1e-3 of the largest is the limit
        state["base_model.model.lin.vtune_start"] = start * torch.tensor(factors, dtype=torch.float64)
        with pytest.raises(ValueError, match="lin must have the singular values that the adapter was trained on"):
            set_peft_model_state_dict(model, state)
    state["base_model.model.lin.vtune_start"] = 1.0005 * start
    set_peft_model_state_dict(model, state)
    basis, _ = layer_of(weight, r=2, save_basis=True)
    saved = get_peft_model_state_dict(basis)
    assert saved["base_model.model.lin.vtune_up"].shape == (5, 2)
    saved["base_model.model.lin.vtune_up"] = random(6, 2)
    with pytest.raises(ValueError, match=r"lin must have the shape that the adapter was trained on, got \(5, 4\)"):
        set_peft_model_state_dict(model, saved)


def test_ties_save_the_vectors():
    """The vectors of equal singular values are anyone's choice: turned ones must come back as they were."""
    with pytest.warns(UserWarning, match="lin has singular values that tie"):
        model, layer = layer_of(torch.eye(4, dtype=torch.float64), r=4)
    turn, _ = torch.linalg.qr(random(4, 4))
    layer.vtune_down["default"], layer.vtune_up["default"] = turn.T.contiguous(), turn
    with torch.no_grad():
        layer.vtune_values["default"].copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    with pytest.warns(UserWarning, match="tie"):
        other, loaded = layer_of(torch.eye(4, dtype=torch.float64), r=4)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(loaded.get_delta_weight("default"), layer.get_delta_weight("default"))


def test_saved_vectors_are_read_whatever_the_config_says():
    """A file with vectors, on a model whose config did not ask for them: the file's are taken, not this machine's."""
    weight = random(5, 4)
    model, layer = layer_of(weight, r=2, save_basis=True)
    turn, _ = torch.linalg.qr(random(5, 2, seed=1))
    layer.vtune_up["default"] = turn  # as another machine's, to be told apart
    with torch.no_grad():
        layer.vtune_values["default"].add_(1)
    other, loaded = layer_of(weight, r=2)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(loaded.vtune_up["default"], turn)
    assert torch.equal(loaded.get_delta_weight("default"), layer.get_delta_weight("default"))
    assert "base_model.model.lin.vtune_up" in get_peft_model_state_dict(other)


def test_signs_of_vector_pairs_do_not_matter():
    _, layer = layer_of(random(5, 4), r=3)
    with torch.no_grad():
        layer.vtune_values["default"].add_(1)
    before = layer.get_delta_weight("default")
    signs = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
    layer.vtune_down["default"], layer.vtune_up["default"] = (
        signs[:, None] * layer.vtune_down["default"],
        layer.vtune_up["default"] * signs,
    )
    assert torch.equal(layer.get_delta_weight("default"), before)


def test_values_can_be_held_at_zero():
    weight = random(4, 4)
    _, layer = layer_of(weight, r=2, clamp_nonnegative=True)
    with torch.no_grad():
        layer.vtune_values["default"].fill_(-5)
    _, zero = layer_of(weight, r=2)
    with torch.no_grad():
        zero.vtune_values["default"].zero_()
    assert torch.equal(layer.get_delta_weight("default"), zero.get_delta_weight("default"))


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2, "padding_mode": "circular"}])
def test_convolutions_are_matrices(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, **options).double()
    model = get_peft_model(nn.ModuleDict({"conv": conv}), SvfitConfig(target_modules=["conv"], r=4, convs=True))
    layer = model.base_model.model["conv"]
    with torch.no_grad():
        layer.vtune_values["default"].mul_(1.5)
    for x in (random(2, 3, 8, 8), random(3, 8, 8)):
        adapter = layer(x)
        layer.merge()
        assert_close(layer(x), adapter)
        layer.unmerge()
    delta = layer.get_delta_weight("default")
    assert delta.shape == conv.weight.shape
    assert torch.linalg.matrix_rank(delta.flatten(1)) == 4
    if not options:
        assert_close(layer(x) - conv(x), F.conv2d(x, delta))
    with pytest.raises(TypeError, match="must name convolutions with 1 group, got conv with 3"):
        get_peft_model(nn.ModuleDict({"conv": nn.Conv2d(3, 3, 3, groups=3)}), SvfitConfig(target_modules=["conv"], convs=True))


@pytest.mark.parametrize("rank", [24, 12])
def test_a_rescaled_spectrum_is_within_reach_and_not_of_a_lora(rank):
    """24 numbers fit a target that shares the singular vectors, 12 all but the rest of the spectrum; the best LoRA of rank 1
    (48 numbers) stays further off."""
    weight = random(24, 24) / 24**0.5
    u, s, vh = torch.linalg.svd(weight)
    wanted = s * (0.5 + torch.rand(24, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    target = u @ torch.diag(wanted) @ vh
    _, layer = layer_of(weight, r=rank)
    values, x = layer.vtune_values["default"], torch.eye(24, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([values], max_iter=100)

    def loss():
        optimizer.zero_grad()
        error = (layer(x) - layer.base_layer.bias - target.T).square().sum()
        error.backward()
        return error

    optimizer.step(loss)
    best_lora = torch.linalg.svdvals(target - weight)[1:].square().sum()  # Eckart-Young
    out_of_reach = (wanted - s)[rank:].square().sum()
    assert_close(loss(), out_of_reach, rtol=1e-6, atol=1e-6 * best_lora.item())
    assert out_of_reach < best_lora


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, r"SvfitConfig\.r must be in \[1, inf\), got 0"),
        ({"energy": 0.0}, r"SvfitConfig\.energy must be in \(0, 1\], got 0\.0"),
        ({"energy": 1.5}, r"SvfitConfig\.energy must be in \(0, 1\]"),
        ({"r": 2, "energy": 0.9}, r"must have r or energy, got both r=2 and energy=0\.9"),
        ({"r": 5}, r"SvfitConfig\.r must be in \[1, 4\], got 5\. lin is 5 x 4"),
    ],
)
def test_bad_ranks(options, match):
    with pytest.raises(ValueError, match=match):
        layer_of(random(5, 4), **options)
