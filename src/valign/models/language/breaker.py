"""A circuit breaker (Nygard, Release It!, 2007) around a chat model: a dead endpoint costs a few time-outs, not one a question."""

from collections.abc import Callable
from threading import Lock
from time import monotonic
from typing import Literal

from valign.checks import check_range
from valign.models.language.chat import ChatModel, ChatUnavailable, Message, Schema

State = Literal["closed", "open", "half-open"]


class CircuitBreaker:
    """Closed, it passes questions on. After ``failures`` in a row it opens and answers none. After ``rest`` it is half open: one
    question goes through, and its outcome closes or opens it again. Safe between threads.

    Only a model that is down counts (`ChatUnavailable`, OSError): one that refuses a question, or answers it badly, is there.

    Args:
        failures: In a row, >= 1.
        rest: Seconds, > 0.
        clock: Seconds that only ever grow.
    """

    def __init__(self, chat: ChatModel, *, failures: int = 3, rest: float = 30.0, clock: Callable[[], float] = monotonic) -> None:
        check_range("CircuitBreaker.failures", failures, low=1)
        check_range("CircuitBreaker.rest", rest, above=0)
        self.chat, self.failures, self.rest, self._clock = chat, failures, rest, clock
        self._lock = Lock()
        self._failed = 0  # in a row
        self._opened = 0.0  # when, by the clock; matters only after enough failures
        self._trial = False  # whether a half-open breaker's one question is on its way

    @property
    def state(self) -> State:
        if self._failed < self.failures:
            return "closed"
        return "half-open" if self._clock() - self._opened >= self.rest else "open"

    def complete(self, messages: list[Message], *, schema: Schema | None = None) -> str:
        """The model's answer. Raises: ChatUnavailable at once while the breaker is open; whatever the model raises."""
        with self._lock:
            state = self.state
            if state == "open" or (state == "half-open" and self._trial):
                left = max(self.rest - (self._clock() - self._opened), 0)
                raise ChatUnavailable(
                    f"The chat model failed {self._failed} times in a row and is left alone for another {left:.0f} s. "
                    "Look into its server's log."
                )
            self._trial = state == "half-open"
        failed = False
        try:
            return self.chat.complete(messages, schema=schema)
        except (ChatUnavailable, OSError):
            failed = True
            raise
        finally:
            with self._lock:
                self._failed = self._failed + 1 if failed else 0
                self._opened = self._clock()
                self._trial = False
