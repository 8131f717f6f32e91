from itertools import islice

from valign.attacks.best_of_n import BestOfN


def test_the_prompt_never_changes(goal, make_scope):
    assert set(islice(BestOfN().search(goal, make_scope()), 5)) == {goal.prompt}
