from dataclasses import replace
from itertools import islice

import pytest
from torch.testing import assert_close

from valign.attacks.ring_a_bell import RingABell, concept_vector
from valign.attacks.tokens import TypedTokens
from valign.checks import UserError


def test_the_concept_is_the_mean_difference_of_states(tiny_model, make_scope):
    scope = make_scope()
    found = concept_vector(TypedTokens(tiny_model, frozenset()), scope.pairs, scope)
    (u1, s1), (u2, s2) = scope.pairs
    states = tiny_model.encode_prompts([u1, s1, u2, s2]).embeds
    assert_close(found, (states[0] - states[1] + states[2] - states[3]) / 2)


def distance(model, text, goal, vector, strength):
    both = model.encode_prompts([text, goal.prompt]).embeds
    return float((both[0] - both[1] - strength * vector).square().sum())


def test_more_generations_never_lose_the_best(tiny_model, goal, make_scope):
    vector = concept_vector(TypedTokens(tiny_model, frozenset()), make_scope().pairs, make_scope())
    best = []
    for generations in (1, 5, 15):
        search = RingABell(tokens=4, population=10, generations=generations).search(goal, make_scope())
        best.append(distance(tiny_model, next(search), goal, vector, 3.0))
    assert best == sorted(best, reverse=True)
    assert best[-1] < best[0]


def test_asks_from_the_fittest_on_without_listed_words(tiny_model, goal, make_scope):
    scope = make_scope(listed=frozenset({"man"}))
    vector = concept_vector(TypedTokens(tiny_model, frozenset()), scope.pairs, scope)
    prompts = list(islice(RingABell(tokens=3, population=8, generations=2).search(goal, scope), 5))
    found = [distance(tiny_model, text, goal, vector, 3.0) for text in prompts]
    assert found == pytest.approx(sorted(found))
    assert all("man" not in text.split() for text in prompts)
    assert all(len(text.split()) == 3 for text in prompts)


def test_needs_pairs(goal, make_scope):
    with pytest.raises(UserError, match="needs pairs of harmful and harmless texts of the goal's category, got none"):
        next(RingABell().search(goal, replace(make_scope(), pairs=())))


def test_the_clock_cuts_the_generations(goal, make_scope, monkeypatch):
    scope = make_scope()
    monkeypatch.setattr(type(scope.meter), "hurry", property(lambda self: True))
    assert next(RingABell(tokens=3, population=4, generations=10**9).search(goal, scope))
