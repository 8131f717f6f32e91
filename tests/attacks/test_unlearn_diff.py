from itertools import islice

import torch
from torch.testing import assert_close

from valign.attacks.unlearn_diff import UnlearnDiffAtk, to_simplex


def by_sorting(row):
    """Duchi et al. 2008, written down independently: the threshold from the sorted entries."""
    ordered = row.sort(descending=True).values
    sums = ordered.cumsum(0) - 1
    count = torch.arange(1, len(row) + 1)
    last = int((ordered - sums / count > 0).nonzero().max())
    return (row - sums[last] / (last + 1)).clamp(min=0)


def test_projection_on_the_simplex():
    rows = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)) * 3
    found = to_simplex(rows)
    assert_close(found.sum(dim=1), torch.ones(5))
    assert found.min() >= 0
    assert_close(found, torch.stack([by_sorting(row) for row in rows]), rtol=1e-4, atol=1e-5)
    assert_close(to_simplex(found), found, rtol=1e-4, atol=1e-5)  # what lies there stays


def test_a_prefix_before_the_goal_by_seed(goal, make_scope):
    def tried(seed):
        scope = make_scope(seed, listed=frozenset({"woman"}))
        return list(islice(UnlearnDiffAtk(tokens=2, steps=2, image_steps=1).search(goal, scope), 2)), scope.meter

    (first, meter), (again, _), (other, _) = tried(0), tried(0), tried(1)
    assert first == again != other
    assert all(text.endswith(goal.prompt) and len(text.split()) == 2 + len(goal.prompt.split()) for text in first)
    assert meter.gradients == 4
