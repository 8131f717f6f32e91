"""Co-Merge: rows are copied, never mixed; what the paper's reading leaves open is pinned down by worked numbers."""

import numpy as np
import pytest
import torch
from expert_data import SHAPES, deltas, random_factors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from valign.checks import UserError
from valign.merging import Ballot, DenseDelta, Expert, NamedDeltas, Votes, co_merge, merge_sum
from valign.merging.co_merge import copy_rows
from valign.merging.votes import activations, tally
from valign.models.files.adapter_files import LoraFactors

# The example of test_votes.py: two rank-1 experts on a 2 x 2 layer, three prompts of one token.
FIRST = LoraFactors(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.1]]), 1.0)
SECOND = LoraFactors(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.2], [2.0]]), 1.0)
TOKENS = torch.tensor([[[1.0, 0.0]], [[1.0, 0.3]], [[0.0, 1.0]]])


def vote_on(experts, inputs):
    """Votes of all kinds, from each module's inputs ``[prompt, token, fan_in]``."""
    ballots = {"output": {}, "down": {}, "rank_unit": {}}
    for module, x in inputs.items():
        parts = [expert.factors(module) for expert in experts]
        heard = [activations(x, part) for part in parts]
        ballots["output"][module] = tally(torch.stack([output for _, output in heard], 1))
        if len({part.rank for part in parts}) == 1:
            down = torch.stack([hidden for hidden, _ in heard], 1)
            ballots["down"][module] = tally(down)
            ballots["rank_unit"][module] = tally(down * torch.stack([part.up.norm(dim=0) for part in parts]))
    return Votes(tuple(expert.name for expert in experts), len(x), ballots)


def random_inputs(seed=0, prompts=20, tokens=3):
    g = torch.Generator().manual_seed(seed)
    return {module: torch.randn(prompts, tokens, fan_in, generator=g) for module, (_, fan_in) in SHAPES.items()}


def equal_rank(make_expert, count=3, **options):
    return [make_expert(f"e{i}", random_factors(rank=3, seed=i, **options)) for i in range(count)]


def test_worked_example(make_expert):
    experts = [make_expert("first", {"m": FIRST}), make_expert("second", {"m": SECOND})]
    votes = vote_on(experts, {"m": TOKENS})
    merged = deltas(co_merge(experts, votes))["m"]
    assert merged.tolist() == [[1.0, 0.0], [0.0, 2.0]]
    factor = deltas(co_merge(experts, votes, granularity="factor"))["m"]
    assert factor.tolist() == [[1.0, 0.0], [2.0, 0.0]]  # A of the first, B mixed: row 1 answers to the wrong input


@pytest.mark.parametrize("granularity", ["output", "rank_unit", "factor"])
def test_one_expert_or_equal_experts_are_kept(granularity, make_expert):
    factors = random_factors(rank=3)
    for names in (["a"], ["b", "c", "d"]):
        experts = [make_expert(name, factors) for name in names]
        merged = deltas(co_merge(experts, vote_on(experts, random_inputs()), granularity=granularity))
        for module in SHAPES:
            assert_close(merged[module], factors[module].delta(), rtol=1e-6, atol=1e-6)


def test_every_row_is_a_row_of_its_winner(three):
    votes = vote_on(three, random_inputs())
    for module, lora in co_merge(three, votes):
        pick = votes.pick(module)
        rows = torch.stack([expert.factors(module).delta() for expert in three])
        assert_close(lora.delta(), rows[pick, torch.arange(len(pick))], rtol=0, atol=1e-6)
        assert len(set(pick.tolist())) > 1  # the example is no landslide


def test_experts_without_a_row_cost_no_rank(three):
    pick = torch.tensor([0, 2, 2, 0, 0, 2, 2])
    parts = [expert.factors("down_blocks.0.to_q") for expert in three]
    assert copy_rows(parts, pick).rank == parts[0].rank + parts[2].rank


def test_permuting_experts_changes_nothing(three):
    inputs = random_inputs()
    one = deltas(co_merge(three, vote_on(three, inputs)))
    other = deltas(co_merge(three[::-1], vote_on(three[::-1], inputs)))
    for module in SHAPES:
        assert_close(one[module], other[module], rtol=1e-6, atol=1e-6)


def test_another_basis_changes_nothing_for_output_rows(make_expert):
    g = torch.Generator().manual_seed(0)
    plain, turned = equal_rank(make_expert), []
    for expert in plain:
        q = torch.randn(3, 3, generator=g) + 3 * torch.eye(3)
        factors = {m: LoraFactors(q @ lora.down, lora.up @ q.inverse(), lora.scale) for m, lora in expert.file.items()}
        turned.append(make_expert(f"{expert.name}t", factors))
    inputs = random_inputs()
    one, other = vote_on(plain, inputs), vote_on(turned, inputs)
    for module in SHAPES:
        assert torch.equal(one.ballots["output"][module].counts, other.ballots["output"][module].counts)
    merged, again = deltas(co_merge(plain, one)), deltas(co_merge(turned, other))
    for module in SHAPES:
        assert_close(merged[module], again[module], rtol=1e-4, atol=1e-4)
    changed = [not torch.equal(one.ballots["down"][module].counts, other.ballots["down"][module].counts) for module in SHAPES]
    assert any(changed)  # factor rows do depend on the basis


def test_a_zero_expert_wins_nothing(make_expert):
    idle = {module: LoraFactors(lora.down, torch.zeros_like(lora.up), 1.0) for module, lora in random_factors(rank=3).items()}
    working = equal_rank(make_expert, 2)
    experts = [make_expert("idle", idle), *working]
    inputs = random_inputs()
    with_idle, without = deltas(co_merge(experts, vote_on(experts, inputs))), deltas(co_merge(working, vote_on(working, inputs)))
    for module in SHAPES:
        assert torch.equal(with_idle[module], without[module])


def test_shared_down_makes_factor_and_output_agree(make_expert):
    shared = random_factors(rank=3, seed=9)
    experts = []
    for i in range(3):
        own = random_factors(rank=3, seed=i)
        factors = {module: LoraFactors(shared[module].down, own[module].up, 1.0) for module in SHAPES}
        experts.append(make_expert(f"e{i}", factors))
    votes = vote_on(experts, random_inputs())
    rows = deltas(co_merge(experts, votes))
    for module, lora in co_merge(experts, votes, granularity="factor"):
        assert lora.rank == 3
        assert_close(lora.delta(), rows[module], rtol=1e-5, atol=1e-5)


def test_disjoint_experts_are_summed_exactly(make_expert):
    experts = []
    for i in range(3):
        factors = {}
        for module, lora in random_factors(rank=2, seed=i).items():
            mine = (torch.arange(lora.up.shape[0]) % 3 == i)[:, None]
            factors[module] = LoraFactors(lora.down, lora.up * mine, 1.0)
        experts.append(make_expert(f"e{i}", factors))
    merged, total = deltas(co_merge(experts, vote_on(experts, random_inputs()))), deltas(merge_sum(experts))
    for module in SHAPES:
        assert_close(merged[module], total[module], rtol=1e-6, atol=1e-6)


def test_rank_units_stay_coherent(make_expert):
    experts = equal_rank(make_expert)
    votes = vote_on(experts, random_inputs())
    for module, lora in co_merge(experts, votes, granularity="rank_unit"):
        assert lora.rank == 3
        for i, winner in enumerate(votes.pick(module, "rank_unit").tolist()):
            part = experts[winner].factors(module)
            assert torch.equal(lora.down[i], part.down[i])
            assert torch.equal(lora.up[:, i], part.up[:, i])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=7, max_size=7), st.lists(st.integers(1, 4), min_size=3, max_size=3))
def test_rows_are_copied_for_any_choice_and_any_ranks(pick, ranks):
    parts = [random_factors({"m": (7, 5)}, rank=rank, seed=rank)["m"] for rank in ranks]
    merged = copy_rows(parts, torch.tensor(pick)).delta()
    for row, winner in enumerate(pick):
        assert_close(merged[row], parts[winner].delta()[row], rtol=1e-5, atol=1e-5)


def test_truncation_reports_its_error(three):
    votes, errors = vote_on(three, random_inputs()), {}
    whole = deltas(co_merge(three, votes))
    for module, lora in co_merge(three, votes, rank=3, errors=errors):
        assert lora.rank == 3
        missed = float((lora.delta() - whole[module]).norm() / whole[module].norm())
        assert errors[module] == pytest.approx(missed, rel=1e-3)
    with pytest.raises(ValueError, match=r"co_merge\.rank must be in \[1, 9\], got 10"):
        co_merge(three, votes, rank=10)


def test_bare_counts_are_votes_on_rows(three):
    counts = {module: torch.tensor([[1] * fan_out, [4] * fan_out, [2] * fan_out]) for module, (fan_out, _) in SHAPES.items()}
    merged = deltas(co_merge(three, counts))
    for module in SHAPES:
        assert_close(merged[module], three[1].factors(module).delta(), rtol=1e-6, atol=1e-6)


def test_refuses_votes_that_do_not_fit(three, make_expert):
    votes = vote_on(three, random_inputs())
    with pytest.raises(UserError, match="must be on shocking, hate, violence, got hate, shocking, violence"):
        co_merge([three[1], three[0], three[2]], votes)
    with pytest.raises(UserError, match=r"must cover mid_block\.to_v"):
        co_merge(three, {"down_blocks.0.to_q": torch.ones(3, 7)})
    with pytest.raises(UserError, match=r"must have 7 output units in down_blocks\.0\.to_q, got 6"):
        co_merge(three, {module: torch.ones(3, 6) for module in SHAPES})
    changed = Votes(votes.experts, votes.prompts, votes.ballots, "prompt", {"fingerprints": ["0", "0", "0"]})
    with pytest.raises(UserError, match="must be on these files"):
        co_merge(three, changed)
    weighted = Votes(votes.experts, votes.prompts, votes.ballots, "prompt", {"weights": [1.0, 1.0, 2.0]})
    with pytest.raises(UserError, match="must be on these weights"):
        co_merge(three, weighted)
    with pytest.raises(UserError, match="the same rank for this granularity"):
        co_merge(three, votes, granularity="factor")


def test_ties_fall_back_to_activation(make_expert):
    experts = [make_expert(name, random_factors(rank=1, seed=i)) for i, name in enumerate("ab")]
    ballots = {
        module: Ballot(torch.ones(2, n, dtype=torch.int64), torch.tensor([[1.0] * n, [2.0] * n]), torch.zeros(n, dtype=torch.int64))
        for module, (n, _) in SHAPES.items()
    }
    merged = deltas(co_merge(experts, Votes(("a", "b"), 2, {"output": ballots})))
    for module in SHAPES:
        assert_close(merged[module], experts[1].factors(module).delta())
    assert isinstance(experts[0], Expert)


def test_dense_experts_are_truncated_with_their_error(three):
    votes, errors, cut = vote_on(three, random_inputs()), {}, {}
    whole = deltas(co_merge(three, votes))
    dense = [
        Expert(expert.name, NamedDeltas({module: DenseDelta(lora.delta()) for module, lora in expert.file.items()}))
        for expert in three
    ]
    for module, lora in co_merge(dense, Votes(votes.experts, votes.prompts, votes.ballots), rank=2, errors=errors):
        cut[module] = lora
        assert lora.rank == 2
        left, values, right = np.linalg.svd(whole[module].double().numpy())
        best = (left[:, :2] * values[:2]) @ right[:2]
        assert_close(lora.delta().double(), torch.from_numpy(best), rtol=1e-3, atol=1e-4)
        assert errors[module] == pytest.approx(float(np.sqrt((values[2:] ** 2).sum() / (values**2).sum())), rel=1e-4)
    assert sorted(cut) == sorted(SHAPES)


def test_a_rank_that_nothing_has_is_refused_with_the_reason(three):
    with pytest.raises(ValueError, match=r".") as caught:
        co_merge(three, vote_on(three, random_inputs()), rank=10)
    assert str(caught.value) == "co_merge.rank must be in [1, 9], got 10. That is the sum of the experts' ranks."
