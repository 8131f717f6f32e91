"""Images of all requests through the model together.

Each image runs through the guard's own loop (generate, check, generate again in a safer style) in a thread of its own; what the
threads ask for at the same time, with the same options, goes into one model call. So there is one guard loop, here as in Python.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class ServedImage:
    """``encoded`` is None where the image was held back."""

    found: GuardedImage
    encoded: Encoded | None


ServedResult = tuple[GuardResult, list[ServedImage]]


@dataclass(frozen=True)
class _Job:
    caption: str
    seed: int
    sampling: SamplingConfig  # jobs of one are generated together


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
        )
        self._threads = ThreadPoolExecutor(2 * settings.max_images, thread_name_prefix="image")  # a request, and its images
        self._seconds = 1.0  # of an image, lately
        metrics.under_way.labels("pictures").set_function(lambda: self._capacity.taken)

    def require_places(self, count: int) -> None:
        """Raises: ApiError 503 if ``count`` more images find no free place now."""
        self._capacity.require(count, retry_after=self._wait())

    async def generate(self, guard: Guard, decision: GuardDecision, request: GenerationRequest) -> ServedResult:
        """Carry the decision out: the result, and an entry per requested image; no entries for a blocked prompt.

        Raises: ApiError 503 if the queue is full; whatever the model raises.
        """
        return await self.run(self._images, guard, decision, request, places=request.count)

    async def compare(self, guard: Guard, decision: GuardDecision, request: GenerationRequest) -> ServedImage:
        """The image of the prompt as it was typed: generated once, and held back if it is flagged. Raises: as `generate`."""
        return await self.run(self._as_typed, guard, decision, request)

    async def run(self, function: Callable[..., T], *arguments: Any, places: int = 1) -> T:
        """Run a function in a thread, within the queue's bound. Raises: ApiError 503 if it is full; whatever it raises."""
        self._capacity.take(places, retry_after=self._wait())
        work = self._threads.submit(function, *arguments)
        work.add_done_callback(lambda _: self._capacity.give(places))  # also when the request was given up
        return await asyncio.wrap_future(work)

    def close(self) -> None:
        self._threads.shutdown()
        self._batcher.close()

    def _images(self, guard: Guard, decision: GuardDecision, request: GenerationRequest) -> ServedResult:
        result = guard.finish(decision, request.prompt)
        if result.blocked:
            return result, []
        others = [self._threads.submit(self._image, guard, result, request, number) for number in range(1, request.count)]
        try:
            first = self._image(guard, result, request, 0)
        finally:
            wait(others)  # the places are given back when this returns, so no image may still be under way
        return result, [first, *(other.result() for other in others)]

    def _image(self, guard: Guard, result: GuardResult, request: GenerationRequest, number: int) -> ServedImage:
        return self._encoded(guard.illustrate(self._generator(request), result, seed=request.seed + number), request)

    def _as_typed(self, guard: Guard, decision: GuardDecision, request: GenerationRequest) -> ServedImage:
        image, attempts = generate_checked(
            self._generator(request),
            request.prompt,
            seed=request.seed,
            styles=(),
            tries=0,
            detector=guard.detector,
            passes=guard.passes,
        )
        result = GuardResult(decision=decision, prompt=request.prompt)
        return self._encoded(GuardedImage(result=result, image=image, attempts=attempts), request)

    def _generator(self, request: GenerationRequest) -> GenerateImage:
        sampling = SamplingConfig(steps=request.steps, guidance_scale=request.guidance_scale)

        def generate(caption: str, seed: int) -> Image:
            return self._batcher.submit(_Job(caption, seed, sampling)).result()

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
