import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from valign.randomness import generator_for
from valign.training.engine.draws import Visits, draw_pair, share

SHAPE = (2, 4, 4)


def draw(*key, **options):
    return draw_pair(generator_for(*key), SHAPE, num_timesteps=1000, **options)


def test_a_draw_depends_on_its_name_alone():
    first, _, again = draw("a", 0), draw("a", 1), draw("a", 0)
    assert first.timestep == again.timestep
    assert_close(first.noise, again.noise, rtol=0, atol=0)
    assert not torch.equal(first.noise, draw("a", 1).noise)


def test_noises_of_a_draw_are_three_different_ones():
    made = draw("a", 0)
    assert not torch.equal(made.noise, made.winner_noise)
    assert not torch.equal(made.winner_noise, made.loser_noise)


def test_frequencies():  # 2000 draws: timestep mean 499.5 +- 3 * 288.7 / sqrt(2000); shares within 3 standard errors
    made = [draw("many", i, empty_prompt_prob=0.1, flip_prob=0.5) for i in range(2000)]
    times = torch.tensor([one.timestep for one in made], dtype=torch.float64)
    assert abs(times.mean() - 499.5) < 19.4
    assert times.min() < 20
    assert times.max() > 979
    assert abs(sum(one.drop_caption for one in made) / 2000 - 0.1) < 0.0202
    assert abs(sum(one.flip for one in made) / 2000 - 0.5) < 0.0336
    assert abs(torch.stack([one.noise for one in made]).mean()) < 3 / (2000 * 32) ** 0.5


def test_switching_dropout_on_changes_no_other_draw():
    plain, dropped = draw("a", 0), draw("a", 0, empty_prompt_prob=1.0, flip_prob=1.0)
    assert (dropped.drop_caption, dropped.flip, plain.drop_caption, plain.flip) == (True, True, False, False)
    assert plain.timestep == dropped.timestep
    assert torch.equal(plain.loser_noise, dropped.loser_noise)


def test_all_timesteps_are_drawn_the_last_among_them():
    seen = {draw_pair(generator_for("few", i), SHAPE, num_timesteps=3).timestep for i in range(60)}
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("stratum", [(0, 1), (3, 4), (9, 10)])
def test_the_largest_random_number_is_the_last_timestep(stratum, monkeypatch):  # (9 + 1 - 2**-53) / 10 is rounded to 1
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([1 - 2**-53, 0.5, 0.5], dtype=torch.float64))
    assert draw("any", stratum=stratum).timestep == 999


@given(st.integers(1, 6), st.integers(0, 50))
def test_strata_cut_the_schedule(parts, name):
    for part in range(parts):
        timestep = draw("s", name, stratum=(part, parts)).timestep
        assert part * 1000 / parts - 1 <= timestep < (part + 1) * 1000 / parts


@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 3))
def test_every_pair_is_visited_once_an_epoch(pairs, per_step, seed):
    steps = -(-3 * pairs // per_step)
    places = [place for step in range(steps) for place in Visits(pairs, per_step, seed).at(step)][: 3 * pairs]
    assert len(places) == len(set(places))
    for epoch in range(3):
        assert sorted(pair for pair, visit in places if visit == epoch) == list(range(pairs))


def test_the_order_is_new_each_epoch():
    visits = Visits(50, 50, 0)
    assert [pair for pair, _ in visits.at(0)] != [pair for pair, _ in visits.at(1)]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_shares_are_a_partition(micros, processes, size):
    items = [(i, 0) for i in range(micros * processes * size)]
    parts = [share(items, micro=m, micros=micros, process=p, processes=processes) for m in range(micros) for p in range(processes)]
    assert [item for part in parts for item in part] == items
    assert {len(part) for part in parts} == {size}
