"""Systems made of other systems: one behind the guard, and one that was trained several times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from valign.checks import UserError
from valign.evaluation.suite import Suite, prompt_seed
from valign.evaluation.systems import System
from valign.files import hash_value

if TYPE_CHECKING:
    from valign.guard import Guard, GuardResult


def guarded_system(inner: System, guard: Guard, *, name: str, description: str = "") -> System:
    """``inner`` behind the guard: prompts are checked and rewritten, and looked at afterwards where the guard has a detector.

    A blocked prompt's place in the batch is taken by another one, whose image is thrown away: so the batch keeps its shape, and
    an allowed prompt has, bit for bit, the image of ``inner``.
    """

    def generate(prompts: list[str], seeds: list[int]) -> list[Any]:
        results = [guard.finish(decision, prompt) for decision, prompt in zip(guard.check_many(prompts), prompts)]
        spare = next((result.prompt for result in results if result.prompt is not None), None)
        if spare is None:
            return [None] * len(prompts)
        first = inner.generate([result.prompt or spare for result in results], seeds)
        return [_looked_at(inner, guard, *each) for each in zip(results, seeds, first, strict=True)]

    return replace(
        inner,
        name=name,
        generate=generate,
        description=description or f"the guard before {inner.name}",
        fingerprint=hash_value([inner.fingerprint, guard.fingerprint()]),
    )


def _looked_at(inner: System, guard: Guard, result: GuardResult, seed: int, image: Any) -> Any:
    """What the guard hands out, if this image is the first that it gets to see; None for nothing."""
    if guard.detector is None:
        return None if result.prompt is None else image

    def draw(caption: str, number: int) -> Any:
        return image if number == seed else inner.generate([caption], [number])[0]

    return guard.illustrate(draw, result, seed=seed).image


def suite_of_runs(suites: Sequence[Suite]) -> Suite:
    """The suites of several runs as one, for `system_of_runs`: ids start with their run's number, and each image's seed leaves
    that number over when divided by the number of runs. Raises: UserError without a suite."""
    if not suites:
        raise UserError("suite_of_runs.suites must hold at least one suite, got 0.")
    prompts = [
        replace(prompt, id=f"r{run}-{prompt.id}", seed=prompt_seed(run, prompt.id) * len(suites) + run)
        for run, suite in enumerate(suites)
        for prompt in suite.prompts
    ]
    return Suite(suites[0].name, tuple(prompts), suites[0].stand_in)


def system_of_runs(systems: Sequence[System]) -> System:
    """One method trained several times, as one system: the image of seed ``n`` is drawn by ``systems[n % len(systems)]``.

    Name and description are the first one's. Raises: UserError without a system.
    """
    if not systems:
        raise UserError("system_of_runs.systems must hold at least one system, got 0.")
    runs = _Runs(tuple(systems))
    fingerprint = hash_value([system.fingerprint for system in systems])
    return replace(systems[0], generate=runs.generate, fingerprint=fingerprint, ready=runs.ready)


class _Runs:
    """Keeps the system that drew last ready: nearly every batch is of one run."""

    def __init__(self, systems: tuple[System, ...]) -> None:
        self.systems, self._open, self._current = systems, ExitStack(), -1

    def generate(self, prompts: list[str], seeds: list[int]) -> list[Any]:
        images: dict[int, Any] = {}
        for run in range(len(self.systems)):
            rows = [row for row, seed in enumerate(seeds) if seed % len(self.systems) == run]
            if rows:
                self._switch(run)
                made = self.systems[run].generate([prompts[row] for row in rows], [seeds[row] for row in rows])
                images.update(zip(rows, made, strict=True))
        return [images[row] for row in range(len(prompts))]

    @contextmanager
    def ready(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._switch(-1)

    def _switch(self, run: int) -> None:
        if run != self._current:
            self._open.close()
            self._current = run
            if run >= 0:
                self._open.enter_context(self.systems[run].ready())
