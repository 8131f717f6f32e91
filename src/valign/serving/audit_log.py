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


class AuditLog:
    """Writes behind every decision; nothing leaves the service before `write` returned."""

    def __init__(self, store: AuditStore, metrics: Metrics) -> None:
        self._store, self._metrics = store, metrics
        self._batcher: Batcher[Entry, Link] = Batcher("audit", store.append, batch_size=GROUP)

    async def write(self, entries: Sequence[Entry]) -> None:
        """Raises: ApiError 503 if the entries are not in the log."""
        works = [self._batcher.submit(entry) for entry in entries]
        try:
            await asyncio.gather(*map(asyncio.wrap_future, works))
        except AuditError as error:
            LOG.error("The audit log cannot be written: %s", error)
            self._metrics.audit_failures.inc(len(entries))
            raise errors.log_down() from None

    def close(self) -> None:
        self._batcher.close()
        self._store.close()
