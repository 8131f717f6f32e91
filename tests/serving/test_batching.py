"""The queue: order, company, errors, cancellation, draining."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valign.serving.batching import LEFT_BEHIND, Batcher, HungError


def held(handle, **options):
    """A batcher whose thread waits at its first item until the event is set; later items gather behind it."""
    go, begun, calls = threading.Event(), threading.Event(), []

    def wrapped(items):
        calls.append(list(items))
        if items == ["first"]:
            begun.set()
            go.wait(10)
            return ["first"]
        return handle(items)

    batcher = Batcher("test", wrapped, **options)
    first = batcher.submit("first")
    assert begun.wait(10)
    return batcher, go, calls, first


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 7))
def test_every_item_gets_its_own_result_in_batches_of_one_key(items, size):
    batches = []

    def handle(batch):
        batches.append(batch)
        return [item * 10 for item in batch]

    batcher = Batcher("test", handle, key=lambda item: item, batch_size=size)
    futures = [batcher.submit(item) for item in items]
    batcher.close()
    assert [future.result(0) for future in futures] == [item * 10 for item in items]
    assert sum(map(len, batches)) == len(items)
    assert all(len(batch) <= size and len(set(batch)) == 1 for batch in batches)


def test_what_waits_together_goes_together_and_the_oldest_key_goes_first():
    batcher, go, calls, _ = held(lambda items: items, key=lambda item: item[0], batch_size=2)
    futures = [batcher.submit(item) for item in ("b1", "a1", "b2", "b3", "a2")]
    go.set()
    batcher.close()
    assert calls == [["first"], ["b1", "b2"], ["a1", "a2"], ["b3"]]
    assert [future.result(0) for future in futures] == ["b1", "a1", "b2", "b3", "a2"]


def test_waits_for_company():
    seen = []
    batcher = Batcher("test", lambda items: seen.append(len(items)) or items, batch_size=3, wait=10)
    futures = [batcher.submit(item) for item in range(3)]
    assert [future.result(5) for future in futures] == [0, 1, 2]  # at once, since it is full
    last = batcher.submit(3)
    batcher.close()
    assert last.result(0) == 3
    assert seen == [3, 1]


def test_an_error_reaches_everybody_in_the_batch_and_the_thread_lives_on():
    def handle(items):
        raise OSError("no disk")

    batcher, go, _, first = held(handle, batch_size=2)
    bad = [batcher.submit(item) for item in "ab"]
    go.set()
    for future in bad:
        with pytest.raises(OSError, match="no disk"):
            future.result(5)
    assert first.result(0) == "first"
    batcher.close()


def test_too_few_results_are_an_error():
    batcher = Batcher("test", lambda items: [], batch_size=2)
    with pytest.raises(RuntimeError, match="expected 1 results, got 0"):
        batcher.submit("x").result(5)
    batcher.close()


def test_a_cancelled_item_is_not_handled():
    batcher, go, calls, _ = held(lambda items: items, batch_size=5)
    gone, kept = batcher.submit("gone"), batcher.submit("kept")
    assert gone.cancel()
    go.set()
    assert kept.result(5) == "kept"
    batcher.close()
    assert calls[1:] == [["kept"]]


def test_several_workers_handle_every_item_once():
    seen = []
    batcher = Batcher("test", lambda items: seen.extend(items) or items, batch_size=3, wait=0.001, workers=4)
    futures = [batcher.submit(item) for item in range(200)]
    assert [future.result(5) for future in futures] == list(range(200))
    batcher.close()
    assert sorted(seen) == list(range(200))


def test_a_closed_queue_takes_nothing():
    batcher = Batcher("test", lambda items: items, batch_size=2)
    batcher.close()
    with pytest.raises(RuntimeError, match="shutting down"):
        batcher.submit("x")


class Panic(BaseException):
    """As a library in another language raises it."""


@pytest.mark.parametrize("raised", [Panic(), SystemExit(1), StopIteration()])
def test_whatever_is_raised_the_next_item_is_handled(raised):
    def handle(items):
        if items == ["bad"]:
            raise raised
        return items

    batcher = Batcher("test", handle, batch_size=1)
    with pytest.raises(RuntimeError, match=f"test died of {type(raised).__name__}"):
        batcher.submit("bad").result(5)
    assert batcher.submit("good").result(5) == "good"
    batcher.close()


def hanging(go, **options):
    """A batcher that hangs at items "hang" until the event is set."""
    return Batcher("test", lambda items: [go.wait(20) if item == "hang" else item for item in items], batch_size=1, **options)


def test_a_call_that_hangs_is_given_up_and_others_go_on():
    go = threading.Event()
    batcher = hanging(go, deadline=0.1)
    stuck, behind = batcher.submit("hang"), batcher.submit("next")
    with pytest.raises(HungError, match=r"test: not done within 0\.1 s"):
        stuck.result(5)
    assert behind.result(5) == "next"
    batcher.close(5)  # the thread that hangs is not waited for
    go.set()


def test_a_queue_takes_nothing_while_too_many_calls_hang_and_recovers():
    go = threading.Event()
    batcher = hanging(go, deadline=0.05, workers=4)
    for _ in range(4 + LEFT_BEHIND):
        with pytest.raises(HungError, match="not done within"):
            batcher.submit("hang").result(5)
    with pytest.raises(HungError, match="calls hang"):
        batcher.submit("more")
    go.set()
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            assert batcher.submit("more").result(5) == "more"
            break
        except HungError:
            time.sleep(0.01)
    batcher.close()


def test_closing_does_not_wait_for_what_hangs():
    go = threading.Event()
    batcher = hanging(go)
    stuck, behind = batcher.submit("hang"), batcher.submit("next")
    batcher.close(0.1)
    for future in (stuck, behind):
        with pytest.raises(HungError, match="not done when the service stopped"):
            future.result(5)
    go.set()


def test_owners_take_turns():
    batcher, go, calls, _ = held(lambda items: items, owner=lambda item: item[0], batch_size=1)
    futures = [batcher.submit(item) for item in ("a1", "a2", "a3", "b1", "c1", "b2")]
    go.set()
    batcher.close()
    assert calls[1:] == [["a1"], ["b1"], ["c1"], ["a2"], ["b2"], ["a3"]]
    assert [future.result(0) for future in futures] == ["a1", "a2", "a3", "b1", "c1", "b2"]


def test_turns_and_calls_are_measured_by_cost():
    batcher, go, calls, _ = held(
        lambda items: items, owner=lambda item: item[0], cost=lambda item: float(len(item)), batch_size=9, batch_cost=6
    )
    for item in ("a-long-one", "a2", "b1", "b2", "b3", "b4"):
        batcher.submit(item)
    go.set()
    batcher.close()
    assert calls[1:] == [["a-long-one"], ["b1", "b2", "b3"], ["b4", "a2"]]


@pytest.mark.parametrize("workers", [2, 8])
def test_items_may_wait_for_items_behind_them(workers):
    batcher = Batcher("test", lambda items: [item() for item in items], batch_size=1, workers=workers)
    for _ in range(20):
        assert batcher.submit(lambda: batcher.submit(lambda: "inner").result(5)).result(5) == "inner"
    batcher.close()
