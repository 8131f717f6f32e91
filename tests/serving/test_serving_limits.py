"""Buckets and places."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valign.serving.errors import ApiError
from valign.serving.limits import Capacity, RateLimit
from valign.serving.settings import Settings


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@given(st.integers(1, 50), st.lists(st.tuples(st.floats(0, 100), st.integers(1, 10)), max_size=40))
def test_never_more_than_the_saved_up_and_the_rate_allow(per_minute, steps):
    clock, spent = Clock(), 0
    limit = RateLimit(per_minute, clock=clock)
    for pause, cost in steps:
        clock.now += pause
        try:
            limit.take("me", cost)
        except ApiError as error:
            clock.now += int(error.headers["retry-after"])
            limit.take("me", cost)  # what it said is true
        spent += min(cost, per_minute)
        assert spent <= per_minute + clock.now * per_minute / 60 + 1e-6


def test_keys_do_not_share_and_zero_is_without_limit():
    limit = RateLimit(1, clock=Clock())
    limit.take("one")
    limit.take("two")
    with pytest.raises(ApiError):
        limit.take("one")
    free = RateLimit(0)
    for _ in range(1000):
        free.take("one", 10)


@given(st.integers(1, 20), st.lists(st.integers(-5, 8), max_size=50))
def test_no_more_places_are_taken_than_there_are(places, moves):
    capacity, taken = Capacity(places), 0
    for count in moves:
        if count >= 0:
            if taken + count > places:
                with pytest.raises(ApiError, match="places in the queue are taken"):
                    capacity.take(count, retry_after=3)
            else:
                capacity.take(count, retry_after=3)
                taken += count
        elif taken >= -count:
            capacity.give(-count)
            taken += count
        assert capacity.taken == taken <= places


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"steps": 101}, {"max_images": 9}, {"names": ()}, {"timeout": 0.0}, {"prompts": "some"}, {"per_minute": -1.0}],
)
def test_settings_are_checked(wrong, as_in_use):
    with pytest.raises(ValueError, match=r"Settings\.\w+ must"):
        Settings(**wrong)
