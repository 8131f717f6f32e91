import pytest
import torch

from valign.attacks.base import SystemAnswer
from valign.attacks.mma import MMA, gradient
from valign.attacks.tokens import TypedTokens
from valign.models.diffusion.prompt_states import prompt_states
from valign.models.diffusion.soft_prompts import encode_ids, padded_ids, token_vectors


def cosine(model, text, goal):
    one, other = prompt_states(model, [text, goal])
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def test_the_gradient_of_place_i_is_that_of_token_i(tiny_model, goal, make_scope):
    tokens, scope = TypedTokens(tiny_model, frozenset()), make_scope()
    ids, wanted = tokens.of("the blue woman"), prompt_states(tiny_model, [goal.prompt])[0]
    found = gradient(tokens, ids, wanted, scope)
    vectors = token_vectors(tiny_model)[ids].clone()
    for place in range(3):  # by differences, one token at a time
        steps = []
        for sign in (1, -1):
            moved = vectors.clone()
            moved[place] += sign * 0.01 * found[place] / found[place].norm()
            with torch.no_grad():
                states = encode_ids(tiny_model, padded_ids(tiny_model, [ids]), moved[None], [1, 2, 3]).embeds
            steps.append(torch.nn.functional.cosine_similarity(states[0, len(ids) + 1], wanted, dim=0))
        assert float(steps[0] - steps[1]) / 0.02 == pytest.approx(float(found[place].norm()), rel=0.05)


def test_the_string_comes_closer_and_holds_no_listed_word(tiny_model, goal, make_scope):
    scope = make_scope(listed=frozenset({"man", "red"}))
    search = MMA(tokens=4, steps=1, between=3, candidates=12).search(goal, scope)
    prompts = [next(search)]
    for _ in range(4):
        prompts.append(search.send(SystemAnswer(prompts[-1], None, None, "guard")))
    scores = [cosine(tiny_model, text, goal.prompt) for text in prompts]
    assert scores == sorted(scores)
    assert scores[-1] > scores[0]
    assert not {"man", "red"} & {word for text in prompts for word in text.split()}
    assert scope.meter.gradients == 13
    assert scope.meter.queries == 0
