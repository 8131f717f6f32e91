"""What a merge reads of prompts is kept between weights, and is what a fresh merge reads, bit for bit."""

import sys
from dataclasses import replace

import pytest
import torch
from expert_data import random_experts

from valign.merging import MERGES, Calibration, MergeContext
from valign.merging.calibration import collect_votes, voters
from valign.models.diffusion.loading import load_model

PROMPTS = {"hate": ["a red man", "red words"], "violence": ["a sharp knife", "a blue knife"]}
FAST = {"co-merge": {"per_category": 2, "states": 1, "steps": 1}, "regmean": {"per_category": 2, "states": 1, "steps": 1}}


@pytest.fixture(scope="module")
def model(tiny_sd):
    return load_model(str(tiny_sd), device="cpu")


@pytest.fixture(scope="module")
def experts(model, tmp_path_factory):
    return random_experts(tmp_path_factory.mktemp("experts"), model, tuple(PROMPTS), "attn2.to_k")


def merged(name, model, experts, weight, kept):
    calibration = Calibration(model=lambda: model, prompts=PROMPTS, captions=["a blue photo", "a green boat"])
    context = MergeContext(calibration=calibration, kept=kept)
    return dict(MERGES[name](**FAST[name])([replace(expert, weight=weight) for expert in experts], context))


@pytest.mark.parametrize(
    ("name", "module", "reads"), [("co-merge", "co_merge", "collect_votes"), ("regmean", "regmean", "text_moments")]
)
def test_a_second_weight_samples_nothing_and_is_what_a_fresh_merge_is(name, module, reads, model, experts, tmp_path, monkeypatch):
    merged(name, model, experts, 1.0, tmp_path)
    fresh = merged(name, model, experts, 0.7, None)
    monkeypatch.setattr(sys.modules[f"valign.merging.{module}"], reads, lambda *_, **__: pytest.fail("the prompts are read again"))
    again = merged(name, model, experts, 0.7, tmp_path)
    assert again.keys() == fresh.keys()
    for layer, factors in fresh.items():
        assert torch.equal(again[layer].up, factors.up)
        assert torch.equal(again[layer].down, factors.down)
    monkeypatch.setitem(PROMPTS, "hate", ["a red word", "red letters"])  # other texts are other files
    with pytest.raises(pytest.fail.Exception, match="read again"):
        merged(name, model, experts, 0.7, tmp_path)


def test_only_a_weight_that_all_have_in_common_cancels(model, experts):
    own, doubled = experts, [replace(expert, weight=2.0) for expert in experts]
    assert [expert.weight for expert in voters(doubled, "base")] == [1.0, 1.0]
    assert voters(doubled, "per_expert") == doubled  # another weight gives other layer inputs
    uneven = [own[0], doubled[1]]
    assert voters(uneven, "base") == uneven
    options = {"per_category": 2, "states": 1, "steps": 1}
    first, second = (collect_votes(model, chosen, PROMPTS, **options) for chosen in (own, doubled))
    assert first.record == second.record
    for module, ballot in first.ballots["output"].items():
        assert torch.equal(ballot.counts, second.ballots["output"][module].counts)
        assert torch.equal(ballot.sums, second.ballots["output"][module].sums)
