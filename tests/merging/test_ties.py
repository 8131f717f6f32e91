"""TIES against an independent transcription in NumPy."""

import numpy as np
import pytest
import torch
from expert_data import SHAPES, deltas, random_factors
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.testing import assert_close

from valign.checks import UserError
from valign.merging import Expert, merge_ties
from valign.merging.ties import elect, trim

FULL = 99  # a rank that truncates nothing


def dense_ties(parts, weights, density, normalize):
    """Entry by entry, all experts at once (Yadav et al., arXiv 2306.01708, section 3)."""
    trimmed = []
    for part in parts:
        keep = max(1, round(density * part.size))
        threshold = np.sort(np.abs(part), axis=None)[-keep]
        trimmed.append(np.where(np.abs(part) >= threshold, part, 0))
    voted = np.stack([w * t for w, t in zip(weights, trimmed)])
    elected = np.sign(voted.sum(0))
    result = np.zeros_like(parts[0])
    for index in np.ndindex(*parts[0].shape):
        agreeing = [n for n in range(len(parts)) if elected[index] != 0 and np.sign(voted[n][index]) == elected[index]]
        total = sum(voted[n][index] for n in agreeing)
        divisor = {"weights": sum(abs(weights[n]) for n in agreeing), "count": len(agreeing), "none": 1}[normalize]
        result[index] = total / divisor if agreeing else 0
    return result


@pytest.mark.parametrize("normalize", ["weights", "count", "none"])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.2])
def test_equals_the_dense_transcription(density, normalize, three):
    weights = (1.0, 0.7, -1.3)
    experts = [Expert(expert.name, expert.file, weight) for expert, weight in zip(three, weights)]
    merged = deltas(merge_ties(experts, density=density, normalize=normalize, rank=FULL))
    for module in SHAPES:
        parts = [expert.file.factors(module).delta().numpy() for expert in experts]
        expected = dense_ties(parts, weights, density, normalize)
        assert_close(merged[module], torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_worked_example():  # the three columns: agreement, majority by mass, an even vote
    a, b = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[2.0, -1.0, -2.0]])
    assert elect(lambda: iter([(1.0, a), (1.0, b)]), "none").tolist() == [[3.0, 3.0, 0.0]]
    assert elect(lambda: iter([(1.0, a), (1.0, b)]), "count").tolist() == [[1.5, 3.0, 0.0]]
    assert elect(lambda: iter([(1.0, a), (3.0, b)]), "weights").tolist() == [[7 / 4, 0.0, -2.0]]  # sums 7, 0, -4


matrices = hnp.arrays("float32", (4, 5), elements=st.floats(-8, 8, width=32))


@settings(max_examples=25, deadline=None)
@given(matrices, st.floats(0.05, 1.0))
def test_trim_keeps_the_largest(delta, density):
    delta = torch.from_numpy(delta)
    kept = trim(delta, density)
    assert ((kept == delta) | (kept == 0)).all()
    gone = delta[(kept == 0) & (delta != 0)].abs()
    stays = delta[kept != 0].abs()
    if len(gone) and len(stays):
        assert gone.max() < stays.min()
    assert (kept != 0).sum() >= min(max(1, round(density * 20)), (delta != 0).sum())


@settings(max_examples=25, deadline=None)
@given(st.lists(matrices, min_size=1, max_size=4))
def test_every_entry_lies_between_zero_and_the_extremes(parts):
    parts = [torch.from_numpy(part) for part in parts]
    result = elect(lambda: iter([(1.0, part) for part in parts]), "weights")
    stack = torch.stack(parts)
    assert (result <= stack.amax(0).clamp(min=0) + 1e-4).all()
    assert (result >= stack.amin(0).clamp(max=0) - 1e-4).all()


def test_opposites_elect_nobody(make_expert):
    factors = random_factors()
    experts = [make_expert("plus", factors), make_expert("minus", factors, weight=-1.0)]
    assert all(delta.abs().max() == 0 for delta in deltas(merge_ties(experts, density=1.0)).values())


def test_reports_the_error_of_the_truncation(three):
    errors = {}
    whole = deltas(merge_ties(three, density=0.3, rank=FULL))
    cut = deltas(merge_ties(three, density=0.3, rank=2, errors=errors))
    for module in SHAPES:
        missed = float((whole[module] - cut[module]).norm() / whole[module].norm())
        assert errors[module] == pytest.approx(missed, rel=1e-3)
        assert missed > 0.05


def test_default_rank_is_that_of_all_experts_together(three):
    assert {lora.rank for _, lora in merge_ties(three)} <= {5, 6, 8}  # 2 + 3 + 4, clipped to the small matrices


@pytest.mark.parametrize("bad", [0.0, 1.5, float("nan")])
def test_refuses_densities_outside_the_unit_interval(bad, three):
    with pytest.raises(ValueError, match=r"Ties\.density must be in \(0, 1"):
        merge_ties(three, density=bad)


def test_other_bases_are_allowed_on_request_and_scales_are_numbers(three, make_expert):
    stranger = make_expert("stranger", random_factors(), base_fingerprint="c" * 64)
    assert sorted(deltas(merge_ties([three[0], stranger], allow_base_mismatch=True))) == sorted(SHAPES)
    with pytest.raises(ValueError, match=r"^Ties\.experts must come from one base model"):
        merge_ties([three[0], stranger])
    with pytest.raises(ValueError, match=r".") as caught:
        merge_ties(three, scale=float("inf"))
    assert str(caught.value) == "Ties.scale must be in [-inf, inf), got inf."
    double, once = deltas(merge_ties(three, scale=2.0, rank=FULL)), deltas(merge_ties(three, rank=FULL))
    for module in SHAPES:
        assert_close(double[module], 2 * once[module], rtol=1e-4, atol=1e-5)


def test_equal_weights_that_the_normalization_cancels_are_refused(three):
    heavy = [Expert(expert.name, expert.file, 2.5) for expert in three]
    with pytest.raises(UserError, match=r"Ties: equal weights of 2\.5 have no effect: normalize 'weights' divides by them\."):
        merge_ties(heavy)
    dict(merge_ties(heavy, normalize="count"))
    dict(merge_ties([heavy[0], *three[1:]]))
