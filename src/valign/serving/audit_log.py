"""Writing the log: entries of all requests in one transaction; `write` returns when they are in the log."""

import asyncio
import logging
from collections.abc import Sequence

from valign.serving import errors
from valign.serving.audit_chain import Entry, Link
from valign.serving.audit_store import AuditError, AuditStore
from valign.serving.batching import Batcher
from valign.serving.metrics import Metrics

LOG = logging.getLogger(__name__)
GROUP = 256  # entries of one transaction at most
DEADLINE = 20.0  # seconds of a transaction; the store's own waits are shorter


class AuditLog:
    """Writes behind every decision; nothing leaves the service before `write` returned."""

    def __init__(self, store: AuditStore, metrics: Metrics) -> None:
        self._store, self._metrics = store, metrics
        self.anchor = None if store.anchor is None else store.anchor.file.name  # so that a log knows that it has one
        self._batcher: Batcher[Entry, Link] = Batcher("audit", store.append, batch_size=GROUP, deadline=DEADLINE)

    async def write(self, entries: Sequence[Entry]) -> None:
        """Raises: ApiError 503 if the entries are not in the log."""
        works = [self._batcher.submit(entry) for entry in entries]
        try:
            await asyncio.gather(*map(asyncio.wrap_future, works))
        except (AuditError, RuntimeError) as error:
            LOG.error("The audit log cannot be written: %s", error)
            self._metrics.audit_failures.inc(len(entries))
            raise errors.log_down() from None

    def close(self, seconds: float) -> None:
        self._batcher.close(seconds)
        self._store.close()
