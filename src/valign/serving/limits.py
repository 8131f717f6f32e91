"""The rate of requests per key, and the bound on the work under way."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from valign.serving import errors

ROUNDING = 1e-9


@dataclass
class _Bucket:
    tokens: float
    seen: float


class RateLimit:
    """A token bucket per key: ``per_minute`` requests, all at once if they were saved up. Used on the event loop only.

    Args: per_minute: 0 is without limit.
    """

    def __init__(self, per_minute: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, name: str, cost: int = 1, *, counted: int = 0) -> None:
        """Count ``cost`` requests, of which ``counted`` were counted before.

        Raises: ApiError 429 with the seconds to wait; then no more is counted.
        """
        if not self.per_minute:
            return
        now, rate = self._clock(), self.per_minute / 60
        bucket = self._buckets.setdefault(name, _Bucket(self.per_minute, now))
        bucket.tokens, bucket.seen = min(self.per_minute, bucket.tokens + (now - bucket.seen) * rate), now
        wanted = min(float(cost), self.per_minute) - counted  # a larger cost could never be met
        if bucket.tokens < wanted - ROUNDING:
            raise errors.too_many_requests((wanted - bucket.tokens) / rate)
        bucket.tokens -= wanted


class Capacity:
    """A bound on the work under way, from any thread. A place is kept until the work ended, even if its request was given up."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.taken = 0
        self._lock = threading.Lock()

    def require(self, count: int, *, retry_after: float) -> None:
        """Raises: ApiError 503 if there are not so many places now."""
        if self.taken + count > self.places:
            raise errors.overloaded(retry_after)

    def take(self, count: int, *, retry_after: float) -> None:
        """Raises: ApiError 503 if there are not so many places; then none is taken."""
        with self._lock:
            self.require(count, retry_after=retry_after)
            self.taken += count

    def give(self, count: int = 1) -> None:
        with self._lock:
            self.taken -= count
