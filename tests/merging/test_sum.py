"""The exact sum."""

import pytest
import torch
from expert_data import SHAPES, deltas, random_factors
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from valign.merging import merge_sum
from valign.models.files.adapter_files import LoraFactors


def test_adds_deltas_of_any_rank_and_scale(make_expert):
    parts = [random_factors(rank=rank, seed=rank) for rank in (1, 3, 4)]
    experts = [make_expert(f"e{i}", factors, weight) for i, (factors, weight) in enumerate(zip(parts, (1.0, -0.5, 2.0)))]
    for module, lora in merge_sum(experts):
        expected = parts[0][module].delta() - 0.5 * parts[1][module].delta() + 2 * parts[2][module].delta()
        assert_close(lora.delta(), expected, rtol=1e-5, atol=1e-5)
        assert lora.rank == 8


def test_a_change_and_its_opposite_cancel(make_expert):
    factors = random_factors()
    experts = [make_expert("plus", factors), make_expert("minus", factors, weight=-1.0)]
    for delta in deltas(merge_sum(experts)).values():
        assert delta.abs().max() < 1e-6


def peft_merge(combination, weights):
    """peft's own answer on one layer with two adapters of rank 4: (merged delta, the two deltas)."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 8)), config, adapter_name="a")
    model.add_adapter("b", config)
    model.add_weighted_adapter(["a", "b"], weights, "merged", combination_type=combination)
    layer = model.base_model.model[0]
    factors = {
        name: {"layer": LoraFactors(layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), layer.scaling[name])}
        for name in "ab"
    }
    return layer.get_delta_weight("merged").detach(), factors


def test_agrees_with_pefts_cat_and_not_with_its_linear(make_expert):
    theirs, factors = peft_merge("cat", [0.7, -0.3])
    experts = [make_expert("a", factors["a"], 0.7), make_expert("b", factors["b"], -0.3)]
    ours = deltas(merge_sum(experts))["layer"]
    assert_close(ours, theirs)
    crossed, _ = peft_merge("linear", [0.7, -0.3])  # adds factors, and with them up_a down_b + up_b down_a
    assert (ours - crossed).norm() > 0.5 * ours.norm()


def test_random_inputs_see_all_runtime_adapters(three):
    g = torch.Generator().manual_seed(0)
    for module, lora in merge_sum(three):
        x = torch.randn(11, SHAPES[module][1], generator=g)
        apart = sum(x @ part.down.T @ part.up.T for part in (expert.factors(module) for expert in three))
        assert_close(x @ lora.down.T @ lora.up.T, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_invertible_change_of_basis_changes_nothing(seed, make_expert):
    g = torch.Generator().manual_seed(seed)
    plain = random_factors(rank=3, seed=seed)
    q = torch.randn(3, 3, generator=g) + 3 * torch.eye(3)
    turned = {name: LoraFactors(q @ lora.down, lora.up @ q.inverse(), lora.scale) for name, lora in plain.items()}
    one, other = deltas(merge_sum([make_expert("a", plain)])), deltas(merge_sum([make_expert("b", turned)]))
    for module in SHAPES:
        assert_close(one[module], other[module], rtol=1e-4, atol=1e-4)
