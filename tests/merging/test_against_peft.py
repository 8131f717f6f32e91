"""TIES and DARE entry by entry against peft's own functions on the same tensors."""

import peft.utils.merge_utils as theirs
import pytest
import torch
from torch.testing import assert_close

from valign.merging.dare_ties import drop
from valign.merging.ties import elect, trim

SHAPES = [(7, 5), (40, 30)]


def parts(shape, count=3):
    g = torch.Generator().manual_seed(shape[0])
    return [torch.randn(shape, generator=g) for _ in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_ties_is_pefts_where_both_keep_as_many_entries(shape, density):
    numel = shape[0] * shape[1]
    kept = int(density * numel)  # peft's count; ours is rounded, so it gets the density that means this one
    trimmed = [trim(part, kept / numel) for part in parts(shape)]
    assert all(torch.equal(ours, theirs.prune(part, density, "magnitude")) for ours, part in zip(trimmed, parts(shape)))
    ours = elect(lambda: ((1.0, part) for part in trimmed), "count")
    assert_close(ours, theirs.ties(parts(shape), torch.ones(3), density))


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_count_alike_when_the_signs_they_elect_are_the_same(shape):
    weights = [1.0, 1.1, 0.9]  # peft elects on unweighted entries, valign on weighted ones: it is the same election here
    same = torch.stack([w * p for w, p in zip(weights, parts(shape))]).sum(0).sign() == torch.stack(parts(shape)).sum(0).sign()
    ours = elect(lambda: zip(weights, parts(shape)), "count")
    other = theirs.disjoint_merge(
        torch.stack([w * p for w, p in zip(weights, parts(shape))]), theirs.calculate_majority_sign_mask(torch.stack(parts(shape)))
    )
    assert same.float().mean() > 0.9
    assert_close(ours[same], other[same])


@pytest.mark.parametrize("density", [0.3, 0.9])
def test_dare_is_pefts_under_the_same_draws(density, monkeypatch):
    part = parts((40, 30))[0]
    draws = torch.rand(part.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: (draws < probabilities).to(probabilities.dtype))
    ours = drop(part, density, torch.Generator().manual_seed(0))
    assert_close(ours, theirs.prune(part, density, "random", rescale=True))


def test_dare_ties_is_pefts_under_the_same_draws(monkeypatch):
    shape, density = (40, 30), 0.5
    draws = iter([torch.rand(shape, generator=torch.Generator().manual_seed(n)) for n in range(3)])
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: (next(draws) < probabilities).to(probabilities.dtype))
    sparse = [drop(part, density, torch.Generator().manual_seed(n)) for n, part in enumerate(parts(shape))]
    ours = elect(lambda: ((1.0, part) for part in sparse), "count")
    assert_close(ours, theirs.dare_ties(parts(shape), torch.ones(3), density))
