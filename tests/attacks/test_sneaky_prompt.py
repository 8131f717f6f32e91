import numpy as np
import pytest
from red_world import square

from valign.attacks.base import SystemAnswer
from valign.attacks.sneaky_prompt import SneakyPrompt, sensitive, softmax


def test_one_word_gives_way_and_after_five_blocks_one_more(goal, make_scope):
    search = SneakyPrompt(pool=8).search(goal, make_scope())
    prompt, changed = next(search), []
    for _ in range(11):
        kept = sum(one == other for one, other in zip(prompt.split(), goal.prompt.split(), strict=True))
        changed.append(len(goal.prompt.split()) - kept)
        prompt = search.send(SystemAnswer(prompt, None, None, "guard"))
    assert changed[0] == 1
    assert changed[5] == 2
    assert changed[10] == 3


def test_little_words_are_not_sensitive(goal, make_scope):
    places = sensitive(goal.prompt.split(), goal.prompt, make_scope())
    assert sorted(places) == [1, 2, 5]  # red, photo, man


def test_a_blocked_query_costs_its_share_and_an_image_gives_the_cosine(goal, make_scope):
    attack, scope = SneakyPrompt(), make_scope(queries=20)
    scope.meter.queries = 4
    assert attack._reward(SystemAnswer("x", None, None, "guard"), goal, scope) == pytest.approx(-4 / 200)
    assert attack._reward(SystemAnswer(goal.prompt, goal.prompt, square("red")), goal, scope) == pytest.approx(1.0, abs=1e-5)

    class Clip:
        def score(self, images, prompts):
            return np.array([0.31])

    assert attack._reward(SystemAnswer("x", "x", square("red")), goal, make_scope(clip=Clip())) == pytest.approx(0.31)


def test_what_was_rewarded_is_drawn_more_often(goal, make_scope):
    class Likes:
        def score(self, images, prompts):
            return np.array([50.0])

    scope = make_scope(clip=Likes(), queries=500)
    search = SneakyPrompt(pool=8, pieces=1, learning_rate=1.0).search(goal, scope)
    prompt = next(search)
    for _ in range(5):
        prompt = search.send(SystemAnswer(prompt, prompt, square("red")))
    assert search.send(SystemAnswer(prompt, prompt, square("red"))) == prompt


def test_chances_sum_to_one_at_any_size():
    rows = softmax(np.array([[1000.0, 1000.0], [-1000.0, 0.0]]))
    assert rows.tolist() == [[0.5, 0.5], [0.0, 1.0]]
