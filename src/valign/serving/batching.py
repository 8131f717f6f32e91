"""Batching in supervised threads: items that wait at the same time and share a key are handled in one call.

No call can stop the queue. One that raises, whatever it raises, fails its own items; one that takes longer than its deadline fails
its items as well, its thread is left behind, and another one goes on. Threads are daemons, so that none keeps the process alive.
"""

import threading
import time
from bisect import insort
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from math import inf, isfinite
from typing import Generic, TypeVar

from valign.checks import check_range

Item = TypeVar("Item")
Result = TypeVar("Result")
LEFT_BEHIND = 16
WATCH = 0.25  # seconds between two looks at the deadlines, at most


class HungError(RuntimeError):
    """A call took longer than its deadline, or too many such calls have not ended yet."""


@dataclass(order=True)
class _Waiting(Generic[Item, Result]):
    start: float  # in line: what its owner had asked for before it, in units of cost
    number: int
    item: Item = field(compare=False)
    key: Hashable = field(compare=False)
    cost: float = field(compare=False)
    future: "Future[Result]" = field(compare=False, default_factory=Future)


@dataclass(frozen=True)
class _Call(Generic[Item, Result]):
    running: "list[_Waiting[Item, Result]]"
    until: float  # on the monotonic clock


class Batcher(Generic[Item, Result]):
    """A queue with threads of its own. The caller bounds how much may wait (`valign.serving.limits.Capacity`).

    Owners are served in turns by what their items cost: one with many items does not keep the others waiting.

    Args:
        handle: Items in, as many results out; what it raises, every item of the batch gets.
        key: Only items of one key share a call; the key of the first in line goes first.
        batch_size: Items per call at most.
        wait: Seconds that a call waits for further items while it is not full.
        workers: Threads at most; 1 unless `handle` waits (for a network) rather than computes.
        cost: Of an item, > 0.
        batch_cost: What the items of one call may cost together; a single item may cost more.
        owner: Whose item it is.
        deadline: Seconds that a call may take.
        left_behind: Threads that may hang beside the workers; then nothing is taken until one ends.
    """

    def __init__(
        self,
        name: str,
        handle: Callable[[list[Item]], Sequence[Result]],
        *,
        key: Callable[[Item], Hashable] = lambda item: None,
        batch_size: int,
        wait: float = 0.0,
        workers: int = 1,
        cost: Callable[[Item], float] = lambda item: 1.0,
        batch_cost: float = inf,
        owner: Callable[[Item], Hashable] = lambda item: None,
        deadline: float = inf,
        left_behind: int = LEFT_BEHIND,
    ) -> None:
        check_range(f"Batcher({name}).batch_size", float(batch_size), low=1)
        self._name, self._handle, self._key, self._cost, self._owner = name, handle, key, cost, owner
        self._batch_size, self._batch_cost, self._wait, self._workers = batch_size, batch_cost, wait, workers
        self._deadline, self._left_behind = deadline, left_behind
        self._queue: list[_Waiting[Item, Result]] = []  # in line
        self._number = count()
        self._line, self._asked = 0.0, dict[Hashable, float]()  # how far the line has come; what each owner has asked for
        self._change = threading.Condition()
        self._closed, self._idle = threading.Event(), 0
        self._threads: set[threading.Thread] = set()  # those that take items
        self._calls: dict[threading.Thread, _Call[Item, Result]] = {}
        self._hung: set[threading.Thread] = set()
        if isfinite(deadline):
            threading.Thread(target=self._watch, name=f"{name}-watch", daemon=True).start()

    def submit(self, item: Item) -> "Future[Result]":
        """A future of the item's result. A future that is cancelled before its turn costs nothing."""
        cost, owner = self._cost(item), self._owner(item)
        with self._change:
            if self._closed.is_set():
                raise RuntimeError("the service is shutting down")
            if len(self._hung) >= self._workers + self._left_behind:
                raise HungError(f"{self._name}: {len(self._hung)} calls hang")
            start = max(self._line, self._asked.get(owner, 0.0))
            self._asked[owner] = start + cost
            waiting: _Waiting[Item, Result] = _Waiting(start, next(self._number), item, self._key(item), cost)
            insort(self._queue, waiting)
            self._hire()
            self._change.notify_all() if self._wait else self._change.notify()
        return waiting.future

    def __len__(self) -> int:
        """Items that wait for their call."""
        return len(self._queue)

    def close(self, seconds: float = inf) -> None:
        """Handle what waits, then stop; what is not done after ``seconds`` is given up."""
        with self._change:
            self._closed.set()
            self._change.notify_all()
            threads = list(self._threads)
        until = time.monotonic() + seconds
        for thread in threads:
            thread.join(None if until == inf else max(0.0, until - time.monotonic()))
        with self._change:
            given_up = [one for call in self._calls.values() for one in call.running] + [
                one for one in self._queue if one.future.set_running_or_notify_cancel()
            ]
            self._queue.clear()
            self._calls.clear()
            self._threads.clear()
        _fail(given_up, HungError(f"{self._name}: not done when the service stopped"))

    def _hire(self) -> None:
        """Start a thread if all are busy and more are allowed; under the lock."""
        if not self._idle and len(self._threads) < self._workers:
            thread = threading.Thread(target=self._work, name=f"{self._name}-{next(self._number)}", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _work(self) -> None:
        me = threading.current_thread()
        while (batch := self._next(me)) is not None:
            running = [one for one in batch if one.future.set_running_or_notify_cancel()]
            if not running:
                continue
            call = _Call(running, time.monotonic() + self._deadline)
            with self._change:
                self._calls[me] = call
            results, failure = self._results(running)
            with self._change:
                mine = self._calls.pop(me, None) is call
                self._hung.discard(me)
            if mine and failure is not None:
                _fail(running, failure)
            elif mine:
                for one, result in zip(running, results):
                    one.future.set_result(result)

    def _results(self, running: "list[_Waiting[Item, Result]]") -> "tuple[Sequence[Result], Exception | None]":
        """What the call gave, or how it failed: libraries in other languages raise more than `Exception`."""
        try:
            results = self._handle([one.item for one in running])
            if len(results) != len(running):
                raise RuntimeError(f"expected {len(running)} results, got {len(results)}")
        except BaseException as error:
            plain = isinstance(error, Exception) and not isinstance(error, StopIteration)
            return [], error if plain else RuntimeError(f"{self._name} died of {type(error).__name__}")  # type: ignore[return-value]
        return results, None

    def _next(self, me: threading.Thread) -> "list[_Waiting[Item, Result]] | None":
        """The first in line and others of its key, in order; None when closed and empty, or when this thread was left behind."""
        with self._change:
            self._idle += 1
            try:
                if me not in self._threads:
                    return None
                self._change.wait_for(lambda: self._queue or self._closed.is_set())
                if self._queue and self._wait:
                    self._change.wait_for(self._full, timeout=self._wait)
            finally:
                self._idle -= 1
            if not self._queue:  # closed, or another worker took all while this one waited for more
                return None if self._closed.is_set() else []
            return self._taken()

    def _taken(self) -> "list[_Waiting[Item, Result]]":
        """Take a batch out of the queue; under the lock."""
        first = self._queue[0]
        batch, rest, cost = list[_Waiting[Item, Result]](), list[_Waiting[Item, Result]](), 0.0
        for one in self._queue:
            fits = len(batch) < self._batch_size and (not batch or cost + one.cost <= self._batch_cost)
            if one.key == first.key and fits:
                batch.append(one)
                cost += one.cost
            else:
                rest.append(one)
        self._queue, self._line = rest, first.start
        if not rest:  # nobody waits, so nobody is ahead of anybody
            self._asked.clear()
            self._line = 0.0
        elif self._workers > 1:
            self._hire()
        return batch

    def _full(self) -> bool:
        if self._closed.is_set() or not self._queue:
            return True
        key = self._queue[0].key
        alike = [one.cost for one in self._queue if one.key == key]
        return len(alike) >= self._batch_size or sum(alike) >= self._batch_cost

    def _watch(self) -> None:
        """Fail the calls that are too late, and let other threads go on in place of theirs."""
        while not self._closed.wait(min(WATCH, self._deadline / 4)):
            now = time.monotonic()
            with self._change:
                late = {thread: call for thread, call in self._calls.items() if call.until <= now}
                for thread in late:
                    del self._calls[thread]
                    self._threads.discard(thread)
                    self._hung.add(thread)
                if late and self._queue:
                    self._hire()
            for call in late.values():
                _fail(call.running, HungError(f"{self._name}: not done within {self._deadline:g} s"))


def _fail(items: "Sequence[_Waiting[Item, Result]]", error: Exception) -> None:
    for one in items:
        one.future.set_exception(error)
