"""One string names a method; what it cannot mean is said before any work."""

import json
from dataclasses import fields

import pytest
import torch
from torch import nn

from valign.checks import UserError
from valign.training.adapting import ADAPTERS, OPTIMIZERS, PERTURBATIONS, parse_tuning
from valign.training.adapting.stepping import by_rank


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_has_a_rate_and_a_recipe(name):
    tuning = parse_tuning(name)
    assert tuning.learning_rate > 0
    assert json.loads(json.dumps(tuning.recipe()))["name"] == name
    assert tuning.recipe()["optimizer"]["weight_decay"] == 0


def test_parts_may_be_combined_and_options_find_their_part():
    tuning = parse_tuning("lora+dct-adamw+mgpo", {"rank": 4, "dct-adamw.rank": 3, "rho": 0.1, "learning_rate": 0.5})
    assert (tuning.adapter.rank, tuning.optimizer.rank, tuning.perturbation.rho) == (4, 3, 0.1)
    assert tuning.learning_rate == 0.5
    assert parse_tuning("full+trion", {"trion.learning_rate": 0.01}).learning_rate == 0.01


@pytest.mark.parametrize("text", ["", "adamw", "lora+", "lora+full", "lora+ggpo+mgpo", "ggpo+lora", "lorra"])
def test_an_unknown_combination_lists_what_there_is(text):
    with pytest.raises(UserError, match=r"method must be ADAPTER\[\+OPTIMIZER\]\[\+PERTURBATION\], got .* Adapters: lora, pissa"):
        parse_tuning(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rang": 4}, r"--set must name an option of the method, got 'rang'\. Known: lora: rank, alpha, .*; adamw: learning_rate"),
        ({"dct-adamw.rank": 4}, r"got 'dct-adamw\.rank'"),
        ({"rank": "many"}, r"lora\.rank: Input should be a valid integer.*, got 'many'"),
        ({"rank": 0}, r"Lora\.rank must be in \[1, inf\), got 0"),
        ({"learning_rate": -1}, r"Lora\.learning_rate must be in \(0, inf\), got -1"),
    ],
)
def test_an_option_that_cannot_be_is_named(settings, message):
    with pytest.raises(UserError, match=message):
        parse_tuning("lora", settings)


def test_names_of_parts_are_unique_and_options_have_defaults():
    names = [*ADAPTERS, *OPTIMIZERS, *PERTURBATIONS]
    assert len(set(names)) == len(names)
    for table in (ADAPTERS, OPTIMIZERS, PERTURBATIONS):
        for part in table.values():
            assert {field.name for field in fields(part)} <= set(vars(part()))


def test_matrices_are_grouped_by_the_rank_that_fits_them():
    shapes = ((8, 4), (3, 9), (5,), (6, 6), (1, 7))
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    groups = by_rank([{"params": parameters, "rate": 2.0}], 5)
    assert [(group["rank"], [tuple(p.shape) for p in group["params"]]) for group in groups] == [
        (5, [(5,), (6, 6), (1, 7)]),
        (4, [(8, 4)]),
        (3, [(3, 9)]),
    ]
    assert all(group["rate"] == 2.0 for group in groups)
