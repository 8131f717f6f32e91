"""What a merge reads of prompts is kept between weights, and is what a fresh merge reads, bit for bit."""

import sys
from dataclasses import replace

import pytest
import torch

from valign.merging import MERGES, Calibration, MergeContext
from valign.merging.calibration import collect_votes, voters
from valign.merging.experts import Expert
from valign.models.diffusion.loading import load_model
from valign.models.files.adapter_files import LoraFactors, open_adapter, save_adapter

PROMPTS = {"hate": ["a red man", "red words"], "violence": ["a sharp knife", "a blue knife"]}
FAST = {"co-merge": {"per_category": 2, "states": 1, "steps": 1}, "regmean": {"per_category": 2, "states": 1, "steps": 1}}


@pytest.fixture(scope="module")
def model(tiny_sd):
    return load_model(str(tiny_sd), device="cpu")


@pytest.fixture(scope="module")
def experts(model, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("experts"), []
    layers = {name: one for name, one in model.denoiser.named_modules() if name.endswith("attn2.to_k")}
    for seed, name in enumerate(PROMPTS):
        g = torch.Generator().manual_seed(seed)
        factors = {
            module: LoraFactors(torch.randn(2, one.in_features, generator=g), torch.randn(one.out_features, 2, generator=g), 0.1)
            for module, one in layers.items()
        }
        save_adapter(folder / name, factors, metadata={"base_fingerprint": model.fingerprint()})
        made.append(Expert(name, open_adapter(folder / name)))
    return made


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
