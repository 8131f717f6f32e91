"""Collecting votes on a real pipeline: against a slow transcription, whatever the order and the batches."""

import hashlib
import logging

import pytest
import torch
from diffusers import DDIMScheduler
from expert_data import random_experts
from jaxtyping import config
from torch.testing import assert_close

from valign.checks import UserError
from valign.merging import Calibration, CoMerge, Expert, MergeContext, Votes, collect_votes
from valign.merging.calibration import balanced
from valign.models.diffusion.loading import load_model
from valign.models.files.adapter_files import LoraFactors, open_adapter, save_adapter

PROMPTS = {"hate": ["a red man", "the blue photo", "a man on a photo"], "violence": ["red", "blue woman", "a painting"]}
FAST = {"states": 2, "steps": 4}


@pytest.fixture(scope="module")
def model(tiny_sd):
    return load_model(str(tiny_sd), device="cpu")


@pytest.fixture(scope="module")
def experts(model, tmp_path_factory):
    return random_experts(tmp_path_factory.mktemp("experts"), model, tuple(PROMPTS), ("to_q", "to_v"))


@torch.no_grad()
def transcription(model, experts, prompts, states, steps, switched_on=()):
    """One prompt at a time, everything kept, dense deltas: ``{module: mean |activation| [expert, neuron]}`` for each prompt."""
    seen = []
    for prompt in prompts:
        inputs = {}
        hooks = [
            model.denoiser.get_submodule(module).register_forward_pre_hook(
                lambda _, args, m=module, inputs=inputs: inputs.setdefault(m, []).append(args[0][0])
            )
            for module in experts[0].file.modules
        ]
        for expert in switched_on:
            for module, lora in expert.file.items():
                model.denoiser.get_submodule(module).weight += lora.delta()
        scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config, clip_sample=False)
        scheduler.set_timesteps(steps)
        seed = int.from_bytes(hashlib.sha256(f"0\n{prompt}".encode()).digest()[:8], "big") >> 1
        x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(seed))
        for t in scheduler.timesteps:
            answer = model.predict(x, t[None], model.encode_prompts([prompt]))
            x = scheduler.step(answer, t, x).prev_sample
        for hook in hooks:
            hook.remove()
        for expert in switched_on:
            for module, lora in expert.file.items():
                model.denoiser.get_submodule(module).weight -= lora.delta()
        at = [(2 * state + 1) * steps // (2 * states) for state in range(states)]
        seen.append(
            {
                module: torch.stack(
                    [
                        torch.stack([(xs[s] @ expert.file.factors(module).delta().T).abs().mean(0) for s in at]).mean(0)
                        for expert in experts
                    ]
                )
                for module, xs in inputs.items()
            }
        )
    return seen


def test_equals_the_transcription(model, experts):
    votes = collect_votes(model, experts, PROMPTS, **FAST)
    texts = [text for texts in PROMPTS.values() for text in texts]
    seen = transcription(model, experts, texts, **FAST)
    assert votes.prompts == 6
    for module in experts[0].file.modules:
        activity = torch.stack([by_module[module] for by_module in seen])
        ballot = votes.ballots["output"][module]
        assert_close(ballot.sums, activity.sum(0), rtol=1e-4, atol=1e-5)
        clear = ((activity[:, 0] - activity[:, 1]).abs() > 1e-4).all(0)  # away from ties that rounding decides
        expected = torch.stack([(activity[:, 0] > activity[:, 1]).sum(0), (activity[:, 1] > activity[:, 0]).sum(0)])
        assert clear.float().mean() > 0.9
        assert torch.equal(ballot.counts[:, clear], expected[:, clear])
        assert set(votes.ballots) == {"output", "down", "rank_unit"}


def test_a_rank_unit_counts_with_the_norm_of_its_column(model, experts):
    """Rank-1 term i answers ``|x a_i| b_i``: its activation is that of ``down``'s row i times the norm of ``up``'s column i."""
    votes = collect_votes(model, experts, PROMPTS, **FAST)
    for module in experts[0].file.modules:
        columns = torch.stack([expert.factors(module).up.square().sum(0).sqrt() for expert in experts])
        assert (columns - 1).abs().max() > 0.1
        sums = votes.ballots["down"][module].sums * columns
        assert_close(votes.ballots["rank_unit"][module].sums, sums, rtol=1e-4, atol=1e-6)


def test_each_expert_can_see_its_own_activations(model, experts):
    votes = collect_votes(model, experts, {"hate": ["a red man"]}, inputs="per_expert", **FAST)
    for n, expert in enumerate(experts):
        (seen,) = transcription(model, experts, ["a red man"], **FAST, switched_on=[expert])
        for module in expert.file.modules:
            assert_close(votes.ballots["output"][module].sums[n], seen[module][n], rtol=1e-3, atol=1e-4)


def test_order_of_prompts_changes_not_one_bit(model, experts):
    one = collect_votes(model, experts, PROMPTS, **FAST)
    turned = {category: texts[::-1] for category, texts in reversed(PROMPTS.items())}
    other = collect_votes(model, experts, turned, **FAST)
    for module, ballot in one.ballots["output"].items():
        assert torch.equal(ballot.counts, other.ballots["output"][module].counts)
        assert torch.equal(ballot.sums, other.ballots["output"][module].sums)
    assert one.record == other.record


def test_batches_change_rounding_only(model, experts):
    one, other = (collect_votes(model, experts, PROMPTS, batch_size=n, **FAST) for n in (1, 4))
    for module, ballot in one.ballots["output"].items():
        assert_close(ballot.sums, other.ballots["output"][module].sums, rtol=1e-4, atol=1e-5)


def test_no_hook_stays_behind_and_the_model_is_unchanged(model, experts):
    weight = model.denoiser.get_submodule(experts[0].file.modules[0]).weight.clone()
    collect_votes(model, experts, {"hate": ["red"]}, **FAST)
    assert not any(layer._forward_hooks for layer in model.denoiser.modules())
    assert torch.equal(weight, model.denoiser.get_submodule(experts[0].file.modules[0]).weight)


def test_sdxl_votes_too(tiny_sdxl, tmp_path):
    model = load_model(str(tiny_sdxl), device="cpu")
    shapes = {name: layer.weight.shape for name, layer in model.denoiser.named_modules() if name.endswith("to_k")}
    save_adapter(tmp_path, {m: LoraFactors(torch.ones(1, i), torch.ones(o, 1), 1.0) for m, (o, i) in shapes.items()}, metadata={})
    votes = collect_votes(model, [Expert("one", open_adapter(tmp_path))], {"hate": ["red"]}, **FAST)
    assert all((ballot.counts == 1).all() for ballot in votes.ballots["output"].values())


def test_ranks_that_differ_leave_row_votes_only(model, experts, tmp_path):
    wide = {m: LoraFactors(torch.ones(3, lora.shape[1]), torch.ones(lora.shape[0], 3), 1.0) for m, lora in experts[0].file.items()}
    save_adapter(tmp_path, wide, metadata={})
    votes = collect_votes(model, [experts[0], Expert("wide", open_adapter(tmp_path))], {"hate": ["red"]}, **FAST)
    assert set(votes.ballots) == {"output"}


def test_an_adapter_that_is_on_is_refused(tiny_sd, experts):
    from valign.models.diffusion.lora import adapter_off, load_adapter

    model = load_model(str(tiny_sd), device="cpu")
    load_adapter(model, experts[0].file.folder, name="on")
    with pytest.raises(UserError, match="must have its adapters off"):
        collect_votes(model, experts, PROMPTS, **FAST)
    with adapter_off(model):
        off = collect_votes(model, experts, {"hate": ["red"]}, **FAST)
    bare = collect_votes(load_model(str(tiny_sd), device="cpu"), experts, {"hate": ["red"]}, **FAST)
    for module, ballot in bare.ballots["output"].items():
        assert torch.equal(ballot.sums, off.ballots["output"][module].sums)


def test_another_base_and_foreign_modules_are_refused(model, experts, tiny_sdxl, tmp_path):
    other = load_model(str(tiny_sdxl), device="cpu")
    with pytest.raises(UserError, match="more modules that it does not"):
        collect_votes(other, experts, PROMPTS, **FAST)
    factors = dict(experts[0].file.items())
    save_adapter(tmp_path, factors, metadata={"base_fingerprint": "0" * 64})
    stranger = [Expert("stranger", open_adapter(tmp_path))]
    with pytest.raises(UserError, match=r"must be the base of stranger \(000000000000\)"):
        collect_votes(model, stranger, PROMPTS, **FAST)
    assert collect_votes(model, stranger, {"hate": ["red"]}, allow_base_mismatch=True, **FAST)


def test_nan_is_named(model, experts, tmp_path):
    module = experts[0].file.modules[0]
    huge = {
        module: LoraFactors(
            torch.full((1, experts[0].file.entries[module].shape[1]), 1e38),
            torch.full((experts[0].file.entries[module].shape[0], 1), 1e38),
            1.0,
        )
    }
    save_adapter(tmp_path, huge, metadata={})
    with pytest.raises(UserError, match="must be finite, got NaN or infinity in the batch of prompt 0"):
        collect_votes(model, [Expert("huge", open_adapter(tmp_path))], {"hate": ["red"]}, **FAST)


# --- which prompts vote ---


def test_every_category_has_the_same_number():
    pools = {"hate": [f"h{i}" for i in range(50)], "sexual": [f"s{i}" for i in range(9)], "violence": [f"v{i}" for i in range(20)]}
    chosen = balanced(pools, 64)
    assert {category: len(texts) for category, texts in chosen.items()} == {"hate": 9, "sexual": 9, "violence": 9}
    assert {category: len(texts) for category, texts in balanced(pools, 4).items()} == {"hate": 4, "sexual": 4, "violence": 4}
    turned = balanced({category: texts[::-1] for category, texts in reversed(pools.items())}, 64)
    assert turned == chosen


def test_a_prompt_of_two_categories_is_used_once():
    shared = [f"x{i}" for i in range(10)]
    chosen = balanced({"hate": [*shared, *(f"h{i}" for i in range(10))], "sexual": shared}, 64)
    assert not set(chosen["hate"]) & set(chosen["sexual"])
    assert len(chosen["hate"]) == len(chosen["sexual"]) == 10
    fewer = balanced({"hate": shared, "sexual": shared}, 64)  # only ten for both
    assert len(fewer["hate"]) == len(fewer["sexual"]) == 5


def test_few_prompts_are_remarked_upon(caplog):
    with caplog.at_level(logging.WARNING):
        balanced({"hate": ["a", "b", "a", " "]}, 64)
    assert "Only 2 prompts per category vote" in caplog.text


@pytest.mark.parametrize("prompts", [{}, {"hate": []}, {"hate": ["a"], "sexual": ["a"]}])
def test_no_prompts_no_votes(prompts):
    with pytest.raises(UserError, match="must hold"):
        balanced(prompts, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_category": 0}, "collect_votes.per_category must be in [1, inf), got 0."),
        ({"steps": 0}, "collect_votes.steps must be in [1, inf), got 0."),
        ({"states": 0}, "collect_votes.states must be in [1, 4], got 0. There is one state per step at most."),
        ({"states": 5}, "collect_votes.states must be in [1, 4], got 5. There is one state per step at most."),
        ({"batch_size": 0}, "collect_votes.batch_size must be in [1, inf), got 0."),
        ({"vote": "loud"}, "collect_votes.vote must be one of prompt, topk, mass; got 'loud'."),
        ({"inputs": "mine"}, "collect_votes.inputs must be one of base, per_expert; got 'mine'."),
    ],
)
def test_refusals_name_the_option_and_its_range(model, experts, options, message, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # as users run it: without the tests' type checks
    with pytest.raises(ValueError, match=r".") as caught:
        collect_votes(model, experts, PROMPTS, **FAST | options)
    assert str(caught.value) == message


def test_the_smallest_options_are_allowed(model, experts):
    votes = collect_votes(model, experts, PROMPTS, per_category=1, states=1, steps=1, batch_size=1)
    assert (votes.experts, votes.prompts, votes.vote) == (("hate", "violence"), 2, "prompt")
    options = {"states": 1, "steps": 1, "inputs": "base", "top_k": None, "seed": 0, "batch_size": 1}
    assert votes.record["options"] == options
    assert votes.record["prompts"] == {"hate": 1, "violence": 1}
    assert votes.record["weights"] == [1.0, 1.0]
    assert votes.record["base_fingerprint"] == model.fingerprint()
    assert votes.record["fingerprints"] == [expert.file.fingerprint() for expert in experts]


def test_a_foreign_module_is_named_with_what_to_do(model, tmp_path):
    save_adapter(
        tmp_path, {m: LoraFactors(torch.ones(1, 4), torch.ones(4, 1), 1.0) for m in ("nowhere.a", "nowhere.b")}, metadata={}
    )
    with pytest.raises(UserError, match=r".") as caught:
        collect_votes(model, [Expert("one", open_adapter(tmp_path))], PROMPTS, **FAST)
    assert str(caught.value) == (
        f"collect_votes.experts must fit {model.folder}, got nowhere.a and 1 more modules that it does not have. "
        "Name the model that they were trained on."
    )


def test_a_merge_collects_with_all_its_options(model, experts, tmp_path):
    asked = {
        "per_category": 2,
        "states": 2,
        "steps": 4,
        "vote": "topk",
        "top_k": 1,
        "inputs": "per_expert",
        "batch_size": 3,
        "seed": 5,
    }
    context = MergeContext(calibration=Calibration(model=lambda: model, prompts=PROMPTS), folder=tmp_path, keep_votes=True)
    list(CoMerge(**asked)(experts, context))
    found, expected = Votes.load(tmp_path), collect_votes(model, experts, PROMPTS, **asked)
    assert (found.record, found.vote) == (expected.record, "topk")
    for unit, modules in expected.ballots.items():
        for module, ballot in modules.items():
            assert torch.equal(found.ballots[unit][module].counts, ballot.counts)
    with pytest.raises(UserError, match=r".") as caught:
        CoMerge()(experts, MergeContext())
    assert str(caught.value) == ("co-merge must have a model and unsafe prompts, or the votes of an earlier co-merge; got neither.")


def test_prompts_are_chosen_by_their_hash():
    texts = [f"prompt {i}" for i in range(12)]
    for seed in (0, 7):
        ordered = sorted(texts, key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest())
        assert balanced({"hate": texts}, 9, seed=seed) == {"hate": ordered[:9]}


@pytest.mark.parametrize("pair", ["xy", "yx"])
def test_the_smaller_category_takes_its_turn_first(pair):
    mine, other = pair
    assert balanced({"a": [mine, other], "b": [mine]}, 64) == {"a": [other], "b": [mine]}


def test_the_remark_says_how_many(caplog):
    with caplog.at_level(logging.WARNING):
        balanced({"hate": [f"h{i}" for i in range(8)]}, 64)
        assert caplog.messages == []
        balanced({"hate": [f"h{i}" for i in range(7)]}, 64)
    assert caplog.messages == ["Only 7 prompts per category vote; below 8 the winners are mostly chance. Add prompts."]


def test_a_model_in_half_precision_votes_with_experts_in_float32(tiny_sd, experts):
    half = load_model(str(tiny_sd), device="cpu", dtype="bfloat16")
    for inputs in ("base", "per_expert"):
        votes = collect_votes(half, experts, {"hate": ["red"]}, inputs=inputs, allow_base_mismatch=True, **FAST)
        for module, ballot in votes.ballots["output"].items():
            assert ballot.sums.dtype == torch.float32
            assert (ballot.sums > 0).all()
            assert ballot.counts.sum(0).tolist() == [1] * experts[0].file.entries[module].shape[0]
