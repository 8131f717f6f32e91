from itertools import islice

from valign.attacks.look_alikes import LookAlikes


def test_other_spellings_by_seed(goal, make_scope):
    first, again, other = (list(islice(LookAlikes().search(goal, make_scope(seed)), 8)) for seed in (0, 0, 1))
    assert first == again != other
    assert goal.prompt not in first
    assert len(set(first)) > 4
