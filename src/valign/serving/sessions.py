"""Open requests and pages by the owner of their key: a key that is taken away ends them."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from valign.serving.errors import wrong_key

T = TypeVar("T")


class Sessions:
    """Used on the event loop only."""

    def __init__(self) -> None:
        self._open: defaultdict[str, set[asyncio.Future[None]]] = defaultdict(set)
        self.on_end: list[Callable[[Collection[str]], None]] = []  # told the owners whose sessions end

    @contextmanager
    def open(self, name: str) -> Iterator["asyncio.Future[None]"]:
        """A future that is done when the owner's key is taken away."""
        ended = asyncio.get_running_loop().create_future()
        self._open[name].add(ended)
        try:
            yield ended
        finally:
            self._open[name].discard(ended)
            if not self._open[name]:
                del self._open[name]

    async def run(self, name: str, work: Coroutine[Any, Any, T]) -> T:
        """The work's result. Raises: ApiError 401 if the owner's key is taken away meanwhile; then the work is cancelled."""
        task = asyncio.create_task(work)
        try:
            with self.open(name) as ended:
                await asyncio.wait((task, ended), return_when=asyncio.FIRST_COMPLETED)
                if not task.done():
                    raise wrong_key()
                return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))

    def end(self, names: Collection[str]) -> None:
        """End what these owners have open."""
        for name in names:
            for ended in self._open.get(name, ()):
                if not ended.done():
                    ended.set_result(None)
        if names:
            for told in self.on_end:
                told(names)
