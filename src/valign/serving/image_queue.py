"""Images of all requests through the model together.

Each image runs through the guard's own loop (generate, check, generate again in a safer style) in a thread of its own; what the
threads ask for at the same time, with the same options, goes into one model call. So there is one guard loop, here as in Python.
Requests take turns at the model by the steps that they ask for; a request that was given up leaves the line.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

from PIL.Image import Image

from valign.guard.guard import Guard
from valign.guard.images.regeneration import GenerateImage, generate_checked
from valign.guard.records import GuardDecision, GuardedImage, GuardResult
from valign.interfaces import Sampler, SamplingConfig
from valign.serving.batching import Batcher
from valign.serving.images import Encoded, encode
from valign.serving.limits import Capacity
from valign.serving.metrics import Metrics
from valign.serving.settings import Settings

T = TypeVar("T")
LATELY = 0.2  # weight of the newest call in the average time of an image
LONGEST = 60.0  # seconds that a client is told to wait at most


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What a request asks for. Its images have the seeds ``seed, seed + 1, ...``"""

    prompt: str
    count: int
    seed: int
    steps: int
    guidance_scale: float
    form: str = "png"
    quality: int = 100
    config: str | None = None  # a safety config beside the key's own


@dataclass(frozen=True)
class ServedImage:
    """``encoded`` is None where the image was held back."""

    found: GuardedImage
    encoded: Encoded | None


ServedResult = tuple[GuardResult, list[ServedImage]]


class _Ticket:
    """A request's place in the model's line; what it waits for there is cancelled when it is given up."""

    def __init__(self) -> None:
        self._lock, self._given_up, self._works = threading.Lock(), False, list[Future[Image]]()

    def add(self, work: "Future[Image]") -> "Future[Image]":
        with self._lock:
            self._works.append(work)
            if self._given_up:
                work.cancel()
        return work

    def give_up(self) -> None:
        with self._lock:
            self._given_up = True
            for work in self._works:
                work.cancel()


@dataclass(frozen=True)
class _Job:
    caption: str
    seed: int
    sampling: SamplingConfig  # jobs of one are generated together
    ticket: _Ticket = field(compare=False)


class ImageQueue:
    """A bounded queue in front of the model."""

    def __init__(self, model: Sampler, settings: Settings, metrics: Metrics) -> None:
        self._model, self._metrics = model, metrics
        self._capacity = Capacity(settings.max_images)
        self._batcher: Batcher[_Job, Image] = Batcher(
            "pictures",
            self._run_jobs,
            key=lambda job: job.sampling,
            batch_size=settings.batch_size,
            wait=settings.batch_wait,
            cost=lambda job: float(job.sampling.steps),
            batch_cost=float(settings.batch_size * settings.steps),
            owner=lambda job: job.ticket,
            deadline=settings.stall,
            left_behind=1,  # a model that hung twice is not started a third time: each call needs its memory
        )
        self._threads: Batcher[Callable[[], Any], Any] = Batcher(
            "image",
            lambda jobs: [job() for job in jobs],
            batch_size=1,
            workers=2 * settings.max_images,  # a request, and its images
            deadline=2 * settings.stall,  # what they wait for has deadlines of its own
        )
        self._seconds = 1.0  # of an image, lately
        metrics.under_way.labels("pictures").set_function(lambda: self._capacity.taken)

    def require_places(self, count: int) -> None:
        """Raises: ApiError 503 if ``count`` more images find no free place now."""
        self._capacity.require(count, retry_after=self._wait())

    async def generate(self, guard: Guard, decision: GuardDecision, request: GenerationRequest) -> ServedResult:
        """Carry the decision out: the result, and an entry per requested image; no entries for a blocked prompt.

        Raises: ApiError 503 if the queue is full; whatever the model raises.
        """
        return await self._run(self._images, guard, decision, request, places=request.count)

    async def compare(self, guard: Guard, decision: GuardDecision, request: GenerationRequest) -> ServedImage:
        """The image of the prompt as it was typed: generated once, and held back if it is flagged. Raises: as `generate`."""
        return await self._run(self._as_typed, guard, decision, request)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in a thread, within the queue's bound. Raises: ApiError 503 if it is full; whatever it raises."""
        return await self._run(lambda ticket: function(*arguments))

    def close(self, seconds: float) -> None:
        self._threads.close(seconds)
        self._batcher.close(seconds)

    async def _run(self, function: Callable[..., T], *arguments: Any, places: int = 1) -> T:
        """The function's result, called with a ticket and the arguments. The places are kept until it ended."""
        self._capacity.take(places, retry_after=self._wait())
        ticket = _Ticket()
        try:
            work: Future[T] = self._threads.submit(lambda: function(ticket, *arguments))
        except RuntimeError:
            self._capacity.give(places)
            raise
        work.add_done_callback(lambda _: self._capacity.give(places))
        try:
            return await asyncio.wrap_future(work)
        except asyncio.CancelledError:
            ticket.give_up()
            raise

    def _images(self, ticket: _Ticket, guard: Guard, decision: GuardDecision, request: GenerationRequest) -> ServedResult:
        result = guard.finish(decision, request.prompt)
        if result.blocked:
            return result, []
        others = [
            self._threads.submit(partial(self._image, ticket, guard, result, request, number)) for number in range(1, request.count)
        ]
        try:
            first = self._image(ticket, guard, result, request, 0)
        finally:
            wait(others)  # the places are given back when this returns, so no image may still be under way
        return result, [first, *(other.result() for other in others)]

    def _image(self, ticket: _Ticket, guard: Guard, result: GuardResult, request: GenerationRequest, number: int) -> ServedImage:
        return self._encoded(guard.illustrate(self._generator(ticket, request), result, seed=request.seed + number), request)

    def _as_typed(self, ticket: _Ticket, guard: Guard, decision: GuardDecision, request: GenerationRequest) -> ServedImage:
        image, attempts = generate_checked(
            self._generator(ticket, request),
            request.prompt,
            seed=request.seed,
            styles=(),
            tries=0,
            detector=guard.detector,
            passes=guard.passes,
        )
        result = GuardResult(decision=decision, prompt=request.prompt)
        return self._encoded(GuardedImage(result=result, image=image, attempts=attempts), request)

    def _generator(self, ticket: _Ticket, request: GenerationRequest) -> GenerateImage:
        sampling = SamplingConfig(steps=request.steps, guidance_scale=request.guidance_scale)

        def generate(caption: str, seed: int) -> Image:
            return ticket.add(self._batcher.submit(_Job(caption, seed, sampling, ticket))).result()

        return generate

    def _encoded(self, found: GuardedImage, request: GenerationRequest) -> ServedImage:
        encoded = None if found.image is None else encode(found.image, form=request.form, quality=request.quality)
        self._metrics.images.labels("blocked" if encoded is None else "drawn").inc()
        return ServedImage(found, encoded)

    def _run_jobs(self, jobs: list[_Job]) -> list[Image]:
        self._metrics.batch.labels("pictures").observe(len(jobs))
        start = perf_counter()
        images = self._model.generate(
            [job.caption for job in jobs],
            seeds=[job.seed for job in jobs],
            sampling=replace(jobs[0].sampling, batch_size=len(jobs)),
        )
        self._seconds += LATELY * ((perf_counter() - start) / len(jobs) - self._seconds)
        return images

    def _wait(self) -> float:
        """Seconds until what waits now should be done."""
        return min(LONGEST, self._seconds * self._capacity.taken)
