"""One string names a method; what it cannot mean is said before any work."""

import json
import re
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import BertConfig, BertModel

from valign.adapters import ADAPTERS, EXPERTS, AttachContext
from valign.adapters.diffora import DiffoRAHandle
from valign.checks import UserError
from valign.optimizers import OPTIMIZERS, PERTURBATIONS
from valign.optimizers.base import by_rank
from valign.training.engine.tuning import parse_tuning


def test_the_guide_names_every_row_of_the_tables():
    text = (Path(__file__).parents[2] / "docs/how-to/finetune.md").read_text()
    table = "".join(line for line in text.splitlines() if line.startswith(("| adapter", "| optimizer", "| perturbation")))
    named = re.findall(r"`([a-z-]+)`", table)
    assert named == [*ADAPTERS, *OPTIMIZERS, *PERTURBATIONS]
    (sentence,) = re.findall(r"end as plain LoRA: (.*?) \(this one", text, flags=re.DOTALL)
    assert sorted(re.findall(r"`([a-z-]+)`", sentence)) == sorted(EXPERTS)


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
        ({"rang": 4}, r"must name an option of the method, got 'rang'\. Did you mean 'rank'\? Known: lora: rank, .*; adamw: learn"),
        ({"dct-adamw.rank": 4}, r"got 'dct-adamw\.rank'"),
        ({"rank": "many"}, r"lora\.rank: Input should be a valid integer.*, got 'many'"),
        ({"rank": 0}, r"LoraOptions\.rank must be in \[1, inf\), got 0"),
        ({"learning_rate": -1}, r"LoraOptions\.learning_rate must be in \(0, inf\), got -1"),
    ],
)
def test_an_option_that_cannot_be_is_named(settings, message):
    with pytest.raises(UserError, match=message):
        parse_tuning("lora", settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("adalora", {"rank": 0}, r"AdaLoRAOptions\.rank must be in \[1, inf\), got 0"),
        ("adalora", {"init_rank": 2}, r"AdaLoRAOptions\.init_rank must be in \[8, inf\), got 2\. It falls to the rank"),
        ("adalora", {"orthogonality": -1}, r"AdaLoRAOptions\.orthogonality must be in \[0, inf\), got -1"),
        ("adalora", {"learning_rate": 0}, r"AdaLoRAOptions\.learning_rate must be in \(0, inf\), got 0"),
        ("increlora", {"rank": 0}, r"IncreLoRAOptions\.rank must be in \[1, inf\), got 0"),
        ("increlora", {"top": 0}, r"IncreLoRAOptions\.top must be in \[1, inf\), got 0"),
        ("increlora", {"orthogonality": -1}, r"IncreLoRAOptions\.orthogonality must be in \[0, inf\), got -1"),
        ("increlora", {"dropout": 2}, r"IncreLoRAOptions\.dropout must be in \[0, 1\], got 2"),
        ("increlora", {"learning_rate": 0}, r"IncreLoRAOptions\.learning_rate must be in \(0, inf\), got 0"),
        ("diffora", {"ratio": 0}, r"DiffoRAOptions\.ratio must be in \(0, 1\], got 0"),
        ("diffora", {"search_share": 1}, r"DiffoRAOptions\.search_share must be in \(0, 0\.9\], got 1"),
    ],
)
def test_numbers_of_adaptive_methods_are_read_before_any_work(name, settings, message):
    with pytest.raises(UserError, match=message):
        parse_tuning(name, settings)


def test_a_search_that_chose_otherwise_is_not_resumed():
    attached = DiffoRAHandle(nn.Linear(2, 2), spent=2, selected=("a", "b"))
    attached.restore(attached.extra())
    with pytest.raises(UserError, match=r"DiffoRA: the state was saved for other modules: b, c\. The search came out otherwise"):
        attached.restore({"selected": ["a", "c"]})


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


SMALL = {"lora-sb": {"rank": 4}, "fourierft": {"n_frequency": 20}, "loca": {"n_coefficients": 20}}
WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "head" and not ADAPTERS[name].forgets])
def test_merged_answers_as_the_adapter_did_and_takes_the_next(name):
    torch.manual_seed(0)
    network = BertModel(BertConfig(vocab_size=30, max_position_embeddings=8, **WIDTHS), add_pooling_layer=False).eval()
    network.requires_grad_(False)

    def ids(number):
        return torch.randint(0, 30, (3, 6), generator=torch.Generator().manual_seed(number))

    def loss(number, half):
        return network(ids(number)).last_hidden_state[..., 0].square().mean()

    context = AttachContext(
        network=network, head=(), targets=("query", "value"), steps=20, batch_size=3, first_rate=1.0, seed=0, loss=loss
    )
    method = parse_tuning(name, SMALL.get(name, {})).adapter
    attached = method.attach(context)
    with torch.no_grad():
        before = network(ids(0)).last_hidden_state
        for group in attached.groups():
            for parameter in group["params"]:
                parameter += 0.1 * torch.randn(parameter.shape)
        expected = attached.network(ids(0)).last_hidden_state
        assert not torch.allclose(expected, before, atol=1e-3)
        merged = attached.merged()
        torch.testing.assert_close(merged(ids(0)).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft's, when an adapter was left behind
        assert method.attach(replace(context, network=merged)).numbers() >= 0
