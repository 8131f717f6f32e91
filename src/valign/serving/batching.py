"""Batching: items that wait at the same time and share a key are handled in one call."""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from valign.checks import check_range

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class _Waiting(Generic[Item, Result]):
    item: Item
    key: Hashable
    future: "Future[Result]" = field(default_factory=Future)


class Batcher(Generic[Item, Result]):
    """A queue with threads of its own. The caller bounds how much may wait (`valign.serving.limits.Capacity`).

    Args:
        handle: Items in, as many results out; what it raises, every item of the batch gets.
        key: Only items of one key share a call; the oldest item's key goes first.
        batch_size: Items per call at most.
        wait: Seconds that a call waits for further items while it is not full.
        workers: Threads; 1 unless `handle` waits (for a network) rather than computes.
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
    ) -> None:
        check_range(f"Batcher({name}).batch_size", float(batch_size), low=1)
        self._handle, self._key = handle, key
        self._batch_size, self._wait = batch_size, wait
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, item: Item) -> "Future[Result]":
        """A future of the item's result. A future that is cancelled before its turn costs nothing."""
        waiting: _Waiting[Item, Result] = _Waiting(item, self._key(item))
        with self._change:
            if self._closed:
                raise RuntimeError("the service is shutting down")
            self._queue.append(waiting)
            self._change.notify_all() if self._wait else self._change.notify()
        return waiting.future

    def __len__(self) -> int:
        """Items that wait for their call."""
        return len(self._queue)

    def close(self) -> None:
        """Handle what waits, then stop."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        torch.get_num_threads()  # takes the process's number over now, not while a guard call has lowered it (`torch_threads`)
        while (batch := self._next()) is not None:
            running = [one for one in batch if one.future.set_running_or_notify_cancel()]
            if not running:
                continue
            try:
                results = self._handle([one.item for one in running])
                if len(results) != len(running):
                    raise RuntimeError(f"expected {len(running)} results, got {len(results)}")
            except Exception as error:
                for one in running:
                    one.future.set_exception(error)
            else:
                for one, result in zip(running, results):
                    one.future.set_result(result)

    def _next(self) -> "list[_Waiting[Item, Result]] | None":
        """The oldest item and others of its key, in order; None when closed and empty."""
        with self._change:
            self._change.wait_for(lambda: self._queue or self._closed)
            if self._queue and self._wait:
                self._change.wait_for(self._full, timeout=self._wait)
            if not self._queue:  # closed, or another worker took all while this one waited for more
                return None if self._closed else []
            key, batch, rest = self._queue[0].key, list[_Waiting[Item, Result]](), deque[_Waiting[Item, Result]]()
            for one in self._queue:
                (batch if one.key == key and len(batch) < self._batch_size else rest).append(one)
            self._queue = rest
            return batch

    def _full(self) -> bool:
        if self._closed or not self._queue:
            return True
        key = self._queue[0].key
        return sum(one.key == key for one in self._queue) >= self._batch_size
