"""Prompts of all requests through the guard together, images through its detector: in supervised threads, off the event loop."""

import asyncio
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from PIL.Image import Image

from valign.checks import UserError
from valign.guard.guard import Guard
from valign.guard.records import GuardDecision
from valign.interfaces import Detector, scores_of
from valign.serving import errors
from valign.serving.batching import Batcher
from valign.serving.limits import Capacity
from valign.serving.metrics import Metrics
from valign.serving.settings import Settings

LOG = logging.getLogger(__name__)
T = TypeVar("T")
LONG = 1000  # characters from which a prompt is checked in a thread of its own kind: short ones never wait for it
PASS = 8000  # characters of one pass of the guard
PARSERS, WATCHERS = 2, 2  # threads that read bodies, and that look at images


@dataclass(frozen=True)
class _Question:
    guard: Guard  # a reload must not change it half-way
    prompt: str
    explain: bool
    owner: Hashable


@dataclass(frozen=True)
class _Work:
    work: Callable[[], Any]
    owner: Hashable = None


class Checks:
    """Bounded queues in front of `Guard.check_many` and the detector. Requests take turns by what their texts and images cost."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._metrics, self._capacity = metrics, Capacity(settings.max_checks)
        deadline = min(settings.check_timeout, settings.timeout)

        def lane(name: str) -> Batcher[_Question, GuardDecision]:
            return Batcher(
                name,
                self._decide,
                key=lambda one: (id(one.guard), one.explain),
                batch_size=settings.check_batch,
                workers=settings.check_workers,
                cost=lambda one: float(len(one.prompt)),
                batch_cost=PASS,
                owner=lambda one: one.owner,
                deadline=deadline,
            )

        self._short, self._long = lane("checks"), lane("long-checks")
        self._parsing = _jobs("parse", PARSERS, deadline)
        self._looking = _jobs("image-checks", WATCHERS, deadline)
        metrics.under_way.labels("checks").set_function(lambda: self._capacity.taken)

    async def decide(
        self, guard: Guard, prompts: Sequence[str], *, owner: Hashable = None, explain: bool = False
    ) -> list[GuardDecision]:
        """A decision per prompt, in order. Every prompt must have passed `require_prompt`: one that has not fails its batch.

        Raises: ApiError 503 if the queue is full, or if the guard itself failed or did not answer in time.
        """
        self._capacity.take(len(prompts), retry_after=1)
        works, missing = [], len(prompts)
        try:
            for prompt in prompts:
                lane = self._long if len(prompt) >= LONG else self._short
                works.append(work := lane.submit(_Question(guard, prompt, explain, owner)))
                missing -= 1
                work.add_done_callback(lambda _: self._capacity.give())
            decisions = list(await asyncio.gather(*map(asyncio.wrap_future, works)))
        except (errors.ApiError, UserError):
            raise
        except Exception as error:
            LOG.error("The guard failed: %s", error)
            raise errors.check_down("guard") from None
        finally:
            self._capacity.give(missing)
            for work in works:
                work.cancel()  # if one failed, or the client hung up; those that are done stay as they are
        for decision in decisions:
            self._metrics.count_decision(decision)
        return decisions

    async def parse(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function that reads what a client sent. Raises: ApiError 503 if it does not end in time; whatever it raises."""
        try:
            found: T = await asyncio.wrap_future(self._parsing.submit(_Work(lambda: function(*arguments))))
        except RuntimeError:
            raise errors.check_down("request") from None
        return found

    async def look(
        self, detector: Detector, read: Callable[[], Image | list[Image]], *, owner: Hashable = None
    ) -> dict[str, float]:
        """The highest score of each class over the images that ``read`` gives, which is called in the detector's thread.

        Raises: ApiError 503 if the queue is full; whatever ``read`` or the detector raise.
        """
        watched = detector.detector if isinstance(detector, WatchedDetector) else detector

        def work() -> Float[np.ndarray, " class"]:
            shown = read()
            images = shown if isinstance(shown, list) else [shown]
            return np.max([scores_of(watched, [image])[0] for image in images], axis=0)

        self._capacity.take(1, retry_after=1)
        job = self._looking.submit(_Work(work, owner))
        job.add_done_callback(lambda _: self._capacity.give())
        row: Float[np.ndarray, " class"] = await asyncio.wrap_future(job)
        return dict(zip(detector.card.classes, row.tolist()))

    def watched(self, detector: Detector) -> Detector:
        """The detector in the supervised threads of `look`, for callers in other threads."""
        return detector if isinstance(detector, WatchedDetector) else WatchedDetector(detector, self._looking)

    def close(self, seconds: float) -> None:
        for queue in (self._parsing, self._short, self._long, self._looking):
            queue.close(seconds)

    def _decide(self, questions: list[_Question]) -> list[GuardDecision]:
        self._metrics.batch.labels("checks").observe(len(questions))
        return questions[0].guard.check_many([one.prompt for one in questions], explain=questions[0].explain)


class WatchedDetector:
    """A detector that runs in supervised threads: a call that hangs raises `HungError` in its caller."""

    def __init__(self, detector: Detector, queue: "Batcher[_Work, Any]") -> None:
        self.detector, self.card, self._queue = detector, detector.card, queue

    def detect(self, images: Sequence[Image]) -> Float[np.ndarray, "image class"]:
        """As the detector's own."""
        found: Float[np.ndarray, "image class"] = self._queue.submit(_Work(lambda: self.detector.detect(images))).result()
        return found


def _jobs(name: str, workers: int, deadline: float) -> "Batcher[_Work, Any]":
    def run(jobs: list[_Work]) -> list[Any]:
        return [job.work() for job in jobs]

    return Batcher(name, run, batch_size=1, workers=workers, owner=lambda job: job.owner, deadline=deadline)
