from itertools import islice

import pytest
import torch
from torch.testing import assert_close

from valign.attacks.p4d import P4D, filled
from valign.checks import UserError
from valign.models.diffusion.guidance.negative import NegativePrompt


def test_layouts():
    assert P4D(layout="n", tokens=2).places([7, 8, 9]) == ([7, 7], [0, 1])
    row, free = P4D(layout="k", every=2).places([1, 2, 3, 4, 5])
    assert (row, free) == ([1, 2, 2, 3, 4, 4, 5], [2, 5])
    assert filled(row, free, [20, 21]) == [1, 2, 20, 3, 4, 21, 5]
    assert P4D(layout="k", every=9).places([1, 2])[1] == [2]  # at least one


def test_gradients_find_a_prompt_by_seed(goal, make_scope):
    def tried(seed):
        scope = make_scope(seed)
        return list(islice(P4D(tokens=3, steps=3, between=1, image_steps=1).search(goal, scope), 3)), scope.meter

    (first, meter), (again, _), (other, _) = tried(0), tried(0), tried(1)
    assert first == again != other
    assert meter.gradients == 5
    assert meter.images == 1  # the attacker's own


def test_k_keeps_the_words_of_the_goal(goal, make_scope):
    text = next(P4D(layout="k", steps=1, image_steps=1).search(goal, make_scope()))
    words = text.split()
    assert [word for i, word in enumerate(words) if i not in (3, 7)] == goal.prompt.split()


def test_without_adapter_and_guidance_both_models_answer_alike(make_scope, tiny_model):
    white, noisy, t = make_scope().white, torch.zeros(1, *tiny_model.latent_shape), torch.tensor([300])
    read = tiny_model.encode_prompts(["a man"])
    assert_close(white.predict(noisy, t, read), white.reference(noisy, t, read), rtol=0, atol=0)


def test_a_negative_prompt_enters_the_attacked_answer_alone(tiny_model):
    from valign.attacks.target import OpenModel

    generator = torch.Generator().manual_seed(0)
    noisy, t = torch.randn(1, *tiny_model.latent_shape, generator=generator), torch.tensor([300])
    read = tiny_model.encode_prompts(["a man"])
    answer, empty, red = (tiny_model.predict(noisy, t, tiny_model.encode_prompts([text])) for text in ("a man", "", "red"))
    white = OpenModel(tiny_model, NegativePrompt("red"), 3.0)
    assert_close(white.predict(noisy, t, read), (red + 3 * (answer - red)).detach())
    assert_close(white.reference(noisy, t, read), (empty + 3 * (answer - empty)).detach())


def test_refuses_an_option_of_the_other_layout():
    from valign.checks import refuse_idle

    with pytest.raises(UserError, match=r"P4D.every has no effect unless layout is 'k'"):
        refuse_idle(P4D(every=2), {"every"})
