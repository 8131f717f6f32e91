"""Images of all requests through the model together.

Each image runs through the guard's own loop (draw, look, draw again in a safer style) in a thread of its own; what the threads
want drawn at the same time, with the same options, goes into one model call. So there is one guard loop, here as in Python.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

from PIL.Image import Image

from valign.guard.guard import Guard
from valign.guard.images.regeneration import Draw, generate_checked
from valign.guard.records import GuardDecision, GuardedImage, GuardResult
from valign.interfaces import Sampler
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
    """What a request wants drawn. Its images have the seeds ``seed, seed + 1, ...``"""

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


@dataclass(frozen=True)
class _Job:
    caption: str
    seed: int
    steps: int
    guidance_scale: float


class ImageQueue:
    """A bounded queue in front of the model."""

    def __init__(self, model: Sampler, settings: Settings, metrics: Metrics) -> None:
        self._model, self._metrics = model, metrics
        self._room = Capacity(settings.max_images)
        self._batcher: Batcher[_Job, Image] = Batcher(
            "pictures",
            self._generate,
            key=lambda job: (job.steps, job.guidance_scale),
            batch_size=settings.batch_size,
            wait=settings.batch_wait,
        )
        self._threads = ThreadPoolExecutor(2 * settings.max_images, thread_name_prefix="picture")  # an order, and its images
        self._seconds = 1.0  # of an image, lately
        metrics.under_way.labels("pictures").set_function(lambda: self._room.taken)

    def require_room(self, count: int) -> None:
        """Raises: ApiError 503 if ``count`` more images find no place now."""
        self._room.require(count, retry_after=self._wait())

    async def draw(self, guard: Guard, decision: GuardDecision, order: GenerationRequest) -> tuple[GuardResult, list[ServedImage]]:
        """Carry the decision out: the result, and an image or its absence for each that was ordered; none for a blocked prompt.

        Raises: ApiError 503 if the queue is full; whatever the model raises.
        """
        return await self.run(self._fill, guard, decision, order, places=order.count)

    async def compare(self, guard: Guard, decision: GuardDecision, order: GenerationRequest) -> ServedImage:
        """What the model draws from the prompt as it was typed: drawn once, and held back if it is flagged. Raises: as `draw`."""
        return await self.run(self._as_typed, guard, decision, order)

    async def run(self, function: Callable[..., T], *arguments: Any, places: int = 1) -> T:
        """A function in a thread, as long as there is room for it. Raises: ApiError 503; whatever the function raises."""
        self._room.take(places, retry_after=self._wait())
        work = self._threads.submit(function, *arguments)
        work.add_done_callback(lambda _: self._room.give(places))  # also when nobody waits for the answer any more
        return await asyncio.wrap_future(work)

    def close(self) -> None:
        self._threads.shutdown()
        self._batcher.close()

    def _fill(self, guard: Guard, decision: GuardDecision, order: GenerationRequest) -> tuple[GuardResult, list[ServedImage]]:
        result = guard.finish(decision, order.prompt)
        if result.blocked:
            return result, []
        others = [self._threads.submit(self._image, guard, result, order, number) for number in range(1, order.count)]
        try:
            first = self._image(guard, result, order, 0)
        finally:
            wait(others)  # the places are given back when this returns, so nothing may still be drawn
        return result, [first, *(other.result() for other in others)]

    def _image(self, guard: Guard, result: GuardResult, order: GenerationRequest, number: int) -> ServedImage:
        return self._encoded(guard.illustrate(self._generator(order), result, seed=order.seed + number), order)

    def _as_typed(self, guard: Guard, decision: GuardDecision, order: GenerationRequest) -> ServedImage:
        image, drawings = generate_checked(
            self._generator(order), order.prompt, seed=order.seed, styles=(), tries=0, detector=guard.detector, passes=guard.passes
        )
        result = GuardResult(decision=decision, prompt=order.prompt)
        return self._encoded(GuardedImage(result=result, image=image, drawings=drawings), order)

    def _generator(self, order: GenerationRequest) -> Draw:
        def draw(caption: str, seed: int) -> Image:
            return self._batcher.submit(_Job(caption, seed, order.steps, order.guidance_scale)).result()

        return draw

    def _encoded(self, found: GuardedImage, order: GenerationRequest) -> ServedImage:
        encoded = None if found.image is None else encode(found.image, form=order.form, quality=order.quality)
        self._metrics.images.labels("blocked" if encoded is None else "drawn").inc()
        return ServedImage(found, encoded)

    def _generate(self, jobs: list[_Job]) -> list[Image]:
        self._metrics.batch.labels("pictures").observe(len(jobs))
        start = perf_counter()
        images = self._model.generate(
            [job.caption for job in jobs],
            seeds=[job.seed for job in jobs],
            steps=jobs[0].steps,
            guidance_scale=jobs[0].guidance_scale,
            batch_size=len(jobs),
        )
        self._seconds += LATELY * ((perf_counter() - start) / len(jobs) - self._seconds)
        return images

    def _wait(self) -> float:
        """Seconds until what waits now should be drawn."""
        return min(LONGEST, self._seconds * self._room.taken)
