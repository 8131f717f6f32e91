"""Counting votes: the worked example, ties, void votes, the other ways to vote, and the record on disk."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.testing import assert_close

from valign.checks import UserError
from valign.merging.votes import Ballot, Votes, activations, tally
from valign.models.files.adapter_files import LoraFactors

# Two experts of rank 1 on a 2 x 2 layer, and three prompts of one token each.
FIRST = LoraFactors(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.1]]), 1.0)
SECOND = LoraFactors(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.2], [2.0]]), 1.0)
TOKENS = torch.tensor([[[1.0, 0.0]], [[1.0, 0.3]], [[0.0, 1.0]]])


def activity(parts, x, what):
    return torch.stack([activations(x, part)[what] for part in parts], 1)


def test_worked_example():
    # |B A x|: expert 0 gives (1, .1) (1, .1) (0, 0), expert 1 gives (0, 0) (.06, .6) (.2, 2)
    outputs = activity((FIRST, SECOND), TOKENS, 1)
    assert_close(outputs[:, 0], torch.tensor([[1.0, 0.1], [1.0, 0.1], [0.0, 0.0]]))
    assert_close(outputs[:, 1], torch.tensor([[0.0, 0.0], [0.06, 0.6], [0.2, 2.0]]))
    ballot = tally(outputs)
    assert ballot.counts.tolist() == [[2, 1], [1, 2]]
    assert ballot.pick().tolist() == [0, 1]
    assert ballot.void.tolist() == [0, 0]
    down = tally(activity((FIRST, SECOND), TOKENS, 0))
    assert down.counts.tolist() == [[2], [1]]  # |A x|: (1, 0) (1, .3) (0, 1)
    assert down.pick().tolist() == [0]


def test_activation_is_the_mean_over_tokens_of_the_dense_answer():
    g = torch.Generator().manual_seed(0)
    lora = LoraFactors(torch.randn(2, 5, generator=g), torch.randn(4, 2, generator=g), 0.3)
    x = torch.randn(3, 7, 5, generator=g)
    hidden, outputs = activations(x, lora)
    assert_close(outputs, (x @ lora.delta().T).abs().mean(1))
    assert_close(hidden, (x @ lora.down.T).abs().mean(1))


def test_ties_go_to_the_larger_sum_then_to_the_lower_index():
    counts = torch.tensor([[2, 2, 1], [2, 2, 5], [1, 2, 5]])
    sums = torch.tensor([[1.0, 3.0, 99.0], [4.0, 3.0, 2.0], [9.0, 3.0, 2.0]])
    ballot = Ballot(counts, sums, torch.zeros(3, dtype=torch.int64))
    assert ballot.pick().tolist() == [1, 0, 1]
    assert ballot.pick("mass").tolist() == [2, 0, 0]
    assert ballot.ties().tolist() == [True, True, True]
    assert ballot.margin().tolist() == [0, 0, 0]


def test_all_zero_votes_are_void():
    seen = torch.tensor([[[0.0, 1.0], [0.0, 0.0]], [[0.5, 0.0], [0.2, 0.0]]])  # prompt, expert, unit
    ballot = tally(seen)
    assert ballot.counts.tolist() == [[1, 1], [0, 0]]
    assert ballot.void.tolist() == [1, 1]


def test_topk_scores_every_experts_own_best():
    seen = torch.tensor([[[5.0, 1.0, 3.0], [0.1, 0.3, 0.2]]])
    assert tally(seen, vote="topk", top_k=1).counts.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert tally(seen, vote="topk", top_k=2).counts.tolist() == [[1, 0, 1], [0, 1, 1]]
    assert tally(seen, vote="topk").counts.tolist() == [[1, 0, 1], [0, 1, 1]]  # 3 units / 2 experts, rounded up
    assert tally(torch.zeros(1, 2, 3), vote="topk").counts.sum() == 0  # an idle expert has no best


seen_by = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5)).flatmap(
    lambda shape: hnp.arrays("float32", shape, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]))
)


@settings(max_examples=30, deadline=None)
@given(seen_by, st.randoms(use_true_random=False))
def test_counts_add_up_and_order_is_irrelevant(array, random):
    seen = torch.from_numpy(array)
    ballot = tally(seen)
    assert (ballot.counts.sum(0) + ballot.void == len(seen)).all()
    prompts = random.sample(range(len(seen)), len(seen))
    again = tally(seen[prompts])
    assert torch.equal(again.counts, ballot.counts)
    assert torch.equal(again.sums, ballot.sums)  # sums of quarters are exact
    half = len(seen) // 2
    if half:
        added = tally(seen[:half]) + tally(seen[half:])
        assert torch.equal(added.counts, ballot.counts)


@settings(max_examples=30, deadline=None)
@given(seen_by, st.integers(0, 3), st.sampled_from([1.5, 2.0, 8.0]))
def test_a_louder_expert_never_loses_votes(array, who, times):
    seen = torch.from_numpy(array)
    who %= seen.shape[1]
    louder = seen.clone()
    louder[:, who] *= times
    assert (tally(louder).counts[who] >= tally(seen).counts[who]).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.permutations(range(3)))
def test_permuting_experts_permutes_the_picks(seed, order):
    seen = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(seed))  # no two are equal
    pick, permuted = tally(seen).pick(), tally(seen[:, order]).pick()
    assert [order[winner] for winner in permuted] == pick.tolist()


@settings(max_examples=30, deadline=None)
@given(seen_by)
def test_an_idle_expert_never_wins_from_one_that_works(array):
    seen = torch.cat([torch.zeros(len(array), 1, array.shape[2]), torch.from_numpy(array)], 1)
    working = seen.amax((0, 1)) > 0
    assert (tally(seen).pick()[working] > 0).all()


def votes():
    g = torch.Generator().manual_seed(0)
    ballots = {
        unit: {module: tally(torch.rand(6, 2, size, generator=g)) for module in ("mid.to_q", "up.to_k")}
        for unit, size in (("output", 5), ("down", 2), ("rank_unit", 2))
    }
    return Votes(("a", "b"), 6, ballots, "mass", {"prompts": {"hate": 6}})


def test_the_record_survives_the_disk(tmp_path):
    before = votes()
    before.save(tmp_path)
    after = Votes.load(tmp_path)
    assert (after.experts, after.prompts, after.vote, after.record) == (("a", "b"), 6, "mass", {"prompts": {"hate": 6}})
    for unit, modules in before.ballots.items():
        for module, ballot in modules.items():
            loaded = after.ballots[unit][module]
            assert loaded.counts.dtype == torch.int64
            assert loaded.sums.dtype == torch.float32
            for part in ("counts", "sums", "void"):
                assert torch.equal(getattr(loaded, part), getattr(ballot, part))
            assert torch.equal(after.pick(module, unit), ballot.pick("mass"))


def test_missing_modules_are_named():
    with pytest.raises(UserError, match=r"must cover down\.to_q \(output\)"):
        votes().pick("down.to_q")
