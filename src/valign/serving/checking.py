"""Prompts of all requests through the guard together, and images that clients send through its detector."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image

from valign.guard.guard import Guard
from valign.guard.records import GuardDecision
from valign.interfaces import Detector, scores_of
from valign.serving.batching import Batcher
from valign.serving.limits import Capacity
from valign.serving.metrics import Metrics
from valign.serving.settings import Settings


@dataclass(frozen=True)
class _Question:
    guard: Guard  # a reload must not change it half-way
    prompt: str
    explain: bool


class Checks:
    """A bounded queue in front of `Guard.check_many`."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._metrics, self._capacity = metrics, Capacity(settings.max_checks)
        self._batcher: Batcher[_Question, GuardDecision] = Batcher(
            "checks",
            self._decide,
            key=lambda one: (id(one.guard), one.explain),
            batch_size=settings.check_batch,
            workers=settings.check_workers,
        )
        metrics.under_way.labels("checks").set_function(lambda: self._capacity.taken)

    async def decide(self, guard: Guard, prompts: Sequence[str], *, explain: bool = False) -> list[GuardDecision]:
        """A decision per prompt, in order. Every prompt must have passed `require_prompt`: one that has not fails its batch.

        Raises: ApiError 503 if the queue is full.
        """
        self._capacity.take(len(prompts), retry_after=1)
        works = [self._batcher.submit(_Question(guard, prompt, explain)) for prompt in prompts]
        for work in works:
            work.add_done_callback(lambda _: self._capacity.give())
        decisions = list(await asyncio.gather(*map(asyncio.wrap_future, works)))
        for decision in decisions:
            self._metrics.count_decision(decision)
        return decisions

    async def look(self, detector: Detector, image: Image) -> dict[str, float]:
        """Scores by class. Raises: ApiError 503 if the queue is full; whatever the detector raises."""
        self._capacity.take(1, retry_after=1)
        try:
            row = (await asyncio.to_thread(scores_of, detector, [image]))[0]
        finally:
            self._capacity.give()
        return dict(zip(detector.card.classes, row.tolist()))

    def close(self) -> None:
        self._batcher.close()

    def _decide(self, questions: list[_Question]) -> list[GuardDecision]:
        self._metrics.batch.labels("checks").observe(len(questions))
        return questions[0].guard.check_many([one.prompt for one in questions], explain=questions[0].explain)
