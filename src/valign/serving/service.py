"""The work behind the routes: check, rewrite, generate, check the image, log, and only then answer.

Fail closed: an answer leaves only after its decision is in the audit log, and an image only after the guard let it through.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, TypeVar

from PIL.Image import Image

from valign.checks import UserError
from valign.guard.guard import Guard
from valign.guard.records import GuardDecision, GuardResult
from valign.guard.stages import stage_fingerprint
from valign.guard.waterfall import require_prompt
from valign.interfaces import Sampler, SamplingConfig, scores_of
from valign.policy import read_guard_config
from valign.policy.block_rules import gaps
from valign.policy.safety_config import join_configs
from valign.serving import errors
from valign.serving.audit_log import AuditLog
from valign.serving.audit_record import Recorder
from valign.serving.audit_store import AuditStore
from valign.serving.batching import Batcher
from valign.serving.canaries import Canaries, CanaryCheck
from valign.serving.checking import Checks, WatchedDetector
from valign.serving.image_queue import GenerationRequest, ImageQueue, ServedImage, ServedResult
from valign.serving.key_configs import KeyConfig
from valign.serving.keys import Keys, gone
from valign.serving.limits import RateLimit
from valign.serving.metrics import Metrics
from valign.serving.sessions import Sessions
from valign.serving.settings import Settings

LOG = logging.getLogger(__name__)
T = TypeVar("T")
WARM_PROMPT = "a red apple"
RELOAD = 120.0  # seconds that reading policy and keys anew may take
MAX_GUARDS = 256  # guards under configs that are kept
AGAIN = 60.0  # seconds until canaries that were answered wrong are looked at again, at most
STOP = 10.0  # seconds that a stop waits for threads; requests were waited for before


@dataclass(frozen=True)
class Caller:
    """Name of the key's owner, and id of the request."""

    name: str
    request: str


@dataclass(frozen=True)
class Rules:
    """What a reload replaces, all at once."""

    guard: Guard
    keys: Keys
    canaries: CanaryCheck | None = None  # of this guard; the service makes it
    configs: Mapping[str, KeyConfig] = field(default_factory=dict)  # by name of the key's owner
    _guards: dict[str, Guard] = field(default_factory=dict, init=False, repr=False, compare=False)  # by config, the newest last

    def guard_of(self, owner: str, asked: str | None = None) -> Guard:
        """The guard under the standing config of a key, and under the one that a request asks for besides.

        Raises: ApiError 400 for a config that cannot be read, or that loosens what the key's role may not.
        """
        own = self.configs.get(owner, KeyConfig())
        try:
            further = None if asked is None else read_guard_config(self.guard.policy, asked, role=own.role)
        except UserError as error:
            raise errors.invalid(str(error), param="safety_config") from None
        config = join_configs(own.config, further)
        if config is None:
            return self.guard
        name = config.fingerprint()
        found = self._guards.pop(name, None) or self.guard.with_config(config)
        self._guards[name] = found
        while len(self._guards) > MAX_GUARDS:
            self._guards.pop(next(iter(self._guards)), None)
        return found


class Service:
    """Loads in the background, serves when warm (``on_ready``) or never (``on_failure``), drains when stopped.

    Args:
        load: Makes the model; runs once, in a thread, after the server listens.
        load_rules: Makes guard and keys; runs after ``load`` and at every `reload`.
        store: Where decisions are logged.
        secret: Keys the hashes of prompts in the log.
        canaries: Prompts and images beside those of the policy; a wrong answer to one means 503 (`valign.serving.canaries`).
        about: What the log's entry about the start says besides, such as the hashes of adapters.
    """

    def __init__(
        self,
        load: Callable[[], Sampler],
        load_rules: Callable[[], Rules],
        store: AuditStore,
        *,
        secret: bytes,
        settings: Settings | None = None,
        canaries: Canaries | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.metrics = Metrics()
        self.limit = RateLimit(self.settings.per_minute)
        self.sessions = Sessions()
        self.image_size = 0  # pixels of a side; known when ready
        self.reload_failed = False
        self.wrong = ""  # what the canaries showed to be wrong
        self.on_ready: Callable[[], None] = lambda: None
        self.on_failure: Callable[[Exception], None] = lambda error: None
        self._record = Recorder(secret, full=self.settings.prompts == "full")
        self._load, self._load_rules, self._about = load, load_rules, dict(about or {})
        self._canaries = canaries or Canaries()
        self._model: Sampler | None = None
        self._log = AuditLog(store, self.metrics)
        self._checks = Checks(self.settings, self.metrics)
        self.parse = self._checks.parse
        self._loader, self._reader = _Loader("load", inf), _Loader("reload", RELOAD)
        self._rules: Rules | None = None
        self._queue: ImageQueue | None = None
        self._loading: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._reloading = asyncio.Lock()

    @property
    def ready(self) -> bool:
        """Whether the models are loaded and warm, and the canaries were answered right."""
        return self._queue is not None and not self.wrong

    @property
    def rules(self) -> Rules:
        """The current guard and keys; a request keeps those that it began with. Raises: ApiError 503 unless it is ready."""
        if self._rules is None or self._queue is None:
            raise errors.not_ready()
        if self.wrong:
            raise errors.canary_wrong()
        return self._rules

    async def start(self) -> None:
        """Begin to load; returns at once."""
        self._loading = asyncio.create_task(self._prepare())

    async def stop(self) -> None:
        """Finish what was admitted, then close the log. Threads that hang are left behind."""
        self.metrics.ready.set(0)
        until = time.monotonic() + STOP
        if self._watching is not None:
            self._watching.cancel()
        if self._loading is not None:
            await asyncio.wait([self._loading], timeout=STOP)
        for part in (self._checks, self._queue, self._loader, self._reader, self._log):
            if part is not None:
                await asyncio.to_thread(part.close, max(0.1, until - time.monotonic()))

    async def reload(self) -> bool:
        """Read policy and keys again. Returns True; or False if they are broken, and the old ones stay in force."""
        async with self._reloading:
            try:
                rules, wrong = await self._reader.run(self._make_rules)
                if wrong:
                    raise RuntimeError(wrong)
                await self._log.write([self._event("reload", rules)])
            except Exception as error:
                LOG.error("Nothing was reloaded, the old policy and keys stay: %s", error)
                self.reload_failed = True
            else:
                LOG.info("Reloaded the keys and policy %s", rules.guard.policy.id)
                old, self._rules, self.reload_failed = self._rules, rules, False
                self._judge_canaries("")
                if old is not None:
                    self.sessions.end(gone(old.keys, rules.keys))
            self.metrics.reloads.labels("failed" if self.reload_failed else "done").inc()
            return not self.reload_failed

    async def moderate(self, caller: Caller, prompts: Sequence[str], *, config: str | None = None) -> list[GuardDecision]:
        """A logged decision per prompt, for which every stage ran.

        Args: config: A safety config of the request, beside the key's own.
        Raises: UserError for what is not a prompt; ApiError 503 if a check or the log is down.
        """
        guard = await self._guard_of(caller, config)
        await self.parse(_require_prompts, guard, prompts)
        decisions = await self._checks.decide(guard, prompts, owner=caller.request, explain=True)
        await self._log.write([self._record.decision(caller.request, caller.name, *pair) for pair in zip(prompts, decisions)])
        for decision in decisions:
            _require_checks(decision)
        return decisions

    async def moderate_image(self, caller: Caller, read: Callable[[], Image | list[Image]]) -> tuple[dict[str, float], float, str]:
        """Logged scores of an image by the detector's classes, its threshold, its name; the highest over its frames.

        Args: read: Gives the image or its frames; called in the detector's thread.
        Raises: ApiError.
        """
        detector = self.rules.guard.detector
        if detector is None:
            raise errors.invalid("This server has no image check. Send text.", param="input")
        card = detector.card
        facts: dict[str, Any] = {"detector": card.name, "threshold": card.threshold}
        try:
            facts["scores"] = await self._checks.look(detector, read, owner=caller.request)
        except errors.ApiError:
            raise
        except Exception as error:
            LOG.error("The image check failed: %s", error)
            facts["error"] = type(error).__name__
        await self._log.write([self._record.image_check(caller.request, caller.name, facts)])
        if "error" in facts:
            raise errors.check_down("image")
        return facts["scores"], card.threshold, card.name

    async def generate(self, caller: Caller, request: GenerationRequest) -> ServedResult:
        """Guard, generate, check, log. At least one of the images may be shown.

        Raises: UserError for what is not a prompt; ApiError 400 if all is blocked, 503 if check, log or queue do not take it.
        """
        guard, queue = await self._guard_of(caller, request.config), self._queue
        assert queue is not None
        await self.parse(_require_prompts, guard, [request.prompt])
        queue.require_places(request.count)
        decision = (await self._checks.decide(guard, [request.prompt], owner=caller.request))[0]
        result, images, outcome = GuardResult(decision=decision, prompt=None), list[ServedImage](), "failed"
        try:
            result, images = await queue.generate(guard, decision, request)
            outcome = "drawn" if any(image.encoded for image in images) else "blocked"
        finally:
            facts = {"outcome": outcome, "seed": request.seed, "steps": request.steps, "guidance_scale": request.guidance_scale}
            await self._log.write([self._record.images(caller.request, caller.name, request.prompt, result, images, facts)])
        if outcome == "blocked":
            raise _refusal(result, images)
        return result, images

    async def compare(self, caller: Caller, request: GenerationRequest) -> ServedImage:
        """The image of the prompt as it was typed, past the guard's text stages; only where the site allows it. Logged.

        Raises: ApiError 400 without an image check, or after a block rule; else as `generate`.
        """
        guard, queue = await self._guard_of(caller, request.config), self._queue
        assert queue is not None
        await self.parse(_require_prompts, guard, [request.prompt])
        decision = (await self._checks.decide(guard, [request.prompt], owner=caller.request))[0]
        _require_checks(decision)
        if not self.settings.compare or guard.detector is None or decision.blocked:
            raise errors.blocked("input", decision.categories)
        image = await queue.compare(guard, decision, request)
        facts = {"outcome": "compared", "seed": request.seed, "steps": request.steps, "guidance_scale": request.guidance_scale}
        result = image.found.result
        await self._log.write([self._record.images(caller.request, caller.name, request.prompt, result, [image], facts)])
        return image

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function of the guard's outside the event loop. Raises: ApiError 503 if the queue of images is full."""
        assert self._queue is not None
        return await self._queue.run(function, *arguments)

    async def _guard_of(self, caller: Caller, config: str | None) -> Guard:
        """`Rules.guard_of`, off the event loop where there is a config to read."""
        rules = self.rules
        if config is None and caller.name not in rules.configs:
            return rules.guard
        return await self.parse(rules.guard_of, caller.name, config)

    async def _prepare(self) -> None:
        try:
            model, rules, wrong = await self._loader.run(self._warm)
            facts = {"model": self.settings.names[0], "model_sha256": _model_hash(model), "canaries": wrong or "right"}
            await self._log.write([self._event("start", rules, **facts | self._about)])
        except Exception as error:
            LOG.error("The service cannot start: %s", error)
            self.on_failure(error)
            return
        newer = self._rules  # of a reload meanwhile
        self._rules = rules if newer is None else replace(newer, guard=newer.guard.for_model(model))
        self._queue = ImageQueue(model, self.settings, self.metrics)
        self._judge_canaries(wrong)
        if not wrong:
            LOG.info("Ready: %s behind policy %s", self.settings.names[0], rules.guard.policy.id)
        self._watching = asyncio.create_task(self._watch())
        self.on_ready()

    async def _watch(self) -> None:
        """Look at the canaries again and again; what changes stands in the log."""
        while True:
            await asyncio.sleep(min(AGAIN, self.settings.canary_every) if self.wrong else self.settings.canary_every)
            rules = self._rules
            assert rules is not None
            assert rules.canaries is not None
            try:
                wrong = await self._reader.run(rules.canaries.run)
            except Exception as error:
                wrong = f"the canaries were not judged: {type(error).__name__}"
            if rules is not self._rules:  # a reload looked at its own
                continue
            if wrong != self.wrong:
                with suppress(errors.ApiError):  # the log is down: every request learns of that by itself
                    await self._log.write([self._event("canaries", rules, canaries=wrong or "right")])
            self._judge_canaries(wrong)

    def _judge_canaries(self, wrong: str) -> None:
        self.wrong = wrong
        self.metrics.canaries.labels("wrong" if wrong else "right").inc()
        self.metrics.ready.set(0 if wrong or self._queue is None else 1)
        if wrong:
            LOG.error("Nothing is served: %s", wrong)

    def _warm(self) -> tuple[Sampler, Rules, str]:
        """Load everything and run it once, so that the first request is not the slow one. The string says what is wrong with it."""
        self._model = model = self._load()
        rules, wrong = self._make_rules()
        image = model.generate([WARM_PROMPT], sampling=SamplingConfig(steps=1, guidance_scale=self.settings.guidance_scale))[0]
        self.image_size = image.width
        if isinstance(watched := rules.guard.detector, WatchedDetector):
            scores_of(watched.detector, [image])  # the first call may take longer than any later one
        return model, rules, wrong

    def _make_rules(self) -> tuple[Rules, str]:
        """Policy and keys as they are now, tried once, and what their canaries show to be wrong, if anything.

        Their detector runs in the supervised threads of `Checks`.
        """
        rules = self._load_rules()
        guard = copy(rules.guard).for_model(self._model)
        if guard.detector is not None:
            guard.detector = self._checks.watched(guard.detector)
        guard.check(WARM_PROMPT, explain=True)
        for gap in gaps(guard.policy):
            LOG.warning("%s", gap)
        check = CanaryCheck(guard, self._canaries)
        return replace(rules, guard=guard, canaries=check), check.run()

    def _event(self, kind: str, rules: Rules, **facts: Any) -> Any:
        policy, detector = rules.guard.policy, rules.guard.detector
        name, weights = (detector.card.name, detector.card.weights_sha256) if detector is not None else (None, None)
        return self._record.event(
            kind,
            anchor=self._log.anchor,
            policy=policy.fingerprint(),
            policy_id=policy.id,
            block_rules=[rule.id for rule in policy.always_block],
            gaps=gaps(policy),
            stages=_stage_hashes(rules.guard),
            configs={name: one.facts() for name, one in rules.configs.items()},
            detector=name,
            detector_sha256=weights,
            **facts,
        )


class _Loader:
    """Runs one function at a time in a supervised thread."""

    def __init__(self, name: str, deadline: float) -> None:
        self._queue: Batcher[Callable[[], Any], Any] = Batcher(
            name, lambda jobs: [job() for job in jobs], batch_size=1, deadline=deadline
        )

    async def run(self, function: Callable[[], T]) -> T:
        """Raises: whatever the function raises; HungError if it does not end in time."""
        found: T = await asyncio.wrap_future(self._queue.submit(function))
        return found

    def close(self, seconds: float) -> None:
        self._queue.close(seconds)


def _stage_hashes(guard: Guard) -> dict[str, dict[str, str]]:
    """By stage, the SHA-256 of its head and of its encoder, where it has them."""
    found = {}
    for stage in guard.stages:
        encoder = getattr(getattr(stage, "encoder", None), "sha256", "")
        hashes = {"weights": stage_fingerprint(stage), "encoder": encoder}
        found[stage.name] = {name: value for name, value in hashes.items() if value}
    return found


def _model_hash(model: Sampler) -> str | None:
    """SHA-256 of the model's files, if it says."""
    fingerprint = getattr(model, "fingerprint", None)
    return None if fingerprint is None else str(fingerprint())


def _require_prompts(guard: Guard, prompts: Sequence[str]) -> None:
    for prompt in prompts:
        require_prompt(guard.policy, prompt)


def _require_checks(decision: GuardDecision) -> None:
    """Raises: ApiError 503 if the prompt was blocked because a check failed, which says nothing about the prompt."""
    if decision.error and decision.blocked:
        raise errors.check_down(decision.stop)


def _refusal(result: GuardResult, images: Sequence[ServedImage]) -> errors.ApiError:
    """Why nothing may be shown: the prompt, a check that is down, or the images."""
    decision = result.decision
    if not images:
        _require_checks(decision)
        return errors.blocked("input", decision.categories)
    last = [image.found.attempts[-1].verdict for image in images]
    if any(verdict is not None and verdict.outcome == "error" for verdict in last):
        return errors.check_down("image")
    return errors.blocked("output", sorted({verdict.category for verdict in last if verdict is not None}))
