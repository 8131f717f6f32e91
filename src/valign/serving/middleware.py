"""ASGI middleware that puts the guard before any application: JSON bodies go on with safe prompts, or not at all."""

import asyncio
import json
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any
from urllib.parse import parse_qs

from starlette.routing import Match, compile_path

from valign.checks import UserError
from valign.guard.guard import Guard
from valign.serving import errors
from valign.serving.asgi import App, Receive, Scope, Send, answer, read_body, route_path, with_body
from valign.serving.batching import Batcher
from valign.serving.json_body import parse

LOG = logging.getLogger(__name__)
WORKERS = 4  # threads that guard; a guard that hangs costs one until it ends

BODILESS = ("GET", "HEAD", "OPTIONS")  # methods that come without a body, as a rule


class GuardMiddleware:
    """``app.add_middleware(GuardMiddleware, guard=guard, paths=["/generate"])``, or around any ASGI application.

    A body must be a JSON object with text in at least one of ``fields``, and every one that it has is guarded: what the guard
    cannot read does not get through, be it in the address, in another format or over a websocket. Answers of its own are OpenAI's
    errors: 400 for a blocked prompt, 503 where a check is down or hangs.

    Args:
        paths: Of routes that take prompts, as the application's router writes them (``"/generate"``, ``"/models/{name}/draw"``),
            without the root path or mount; all others pass unread.
        fields: Of the body that an image is generated from.
        max_body: Bytes.
        body_timeout: Seconds in which a body must have come.
        check_timeout: Seconds in which the guard must answer.
    Raises: ValueError without paths or fields, or if the application shows its routes and a path is none of them.
    """

    def __init__(
        self,
        app: App,
        guard: Guard,
        *,
        paths: Collection[str],
        fields: Sequence[str] = ("prompt",),
        max_body: int = 4 * 2**20,
        body_timeout: float = 30.0,
        check_timeout: float = 60.0,
    ) -> None:
        if not paths or not fields:
            raise ValueError("GuardMiddleware must have paths and fields to guard, got none. Name them.")
        _require_routes(app, paths)
        self._app, self._guard, self._fields = app, guard, tuple(fields)
        self._patterns = [compile_path(path)[0] for path in paths]  # as the router reads them, and no stricter
        self._max_body, self._body_timeout = max_body, body_timeout
        self._queue: Batcher[Callable[[], bytes], bytes] = Batcher(
            "guard", lambda jobs: [job() for job in jobs], batch_size=1, workers=WORKERS, deadline=check_timeout
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or not self._guards(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        asked = parse_qs(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        if scope["method"] in BODILESS and not asked.keys() & set(self._fields) and not _has_body(scope):
            await self._app(scope, receive, send)
            return
        try:
            if found := sorted(asked.keys() & set(self._fields)):
                raise errors.invalid(f"{found[0]} must stand in the body, not in the address.", param=found[0])
            given = await read_body(receive, limit=self._max_body, seconds=self._body_timeout)
            body = await asyncio.wrap_future(self._queue.submit(lambda: self._guarded(given)))
        except errors.ApiError as error:
            await answer(error, send, rest=receive if error.status == errors.TOO_LARGE else None)
            return
        except Exception as error:
            LOG.error("The guard failed: %s", error)
            await answer(errors.check_down("guard"), send)
            return
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        await self._app(scope, with_body(body, receive), send)

    def _guards(self, scope: Scope) -> bool:
        """Whether the router would find one of the paths: below the root path, or in an address that does not have it."""
        return any(pattern.match(path) for pattern in self._patterns for path in (scope["path"], route_path(scope)))

    def _guarded(self, body: bytes) -> bytes:
        """The body with safe prompts, written anew: another parser might read other words in unusual JSON."""
        data = parse(body)
        if not isinstance(data, dict):
            raise errors.invalid("The body must be a JSON object.", param=None, code="invalid_json")
        fields = [field for field in self._fields if data.get(field) is not None]
        if not fields:
            raise errors.invalid(f"{self._fields[0]} is missing.", param=self._fields[0])
        safe = {field: self._prompt(data[field], field) for field in fields}
        return json.dumps({**data, **safe}).encode()

    def _prompt(self, prompt: Any, field: str) -> str:
        try:
            result = self._guard.guard(prompt)
        except (TypeError, UserError) as error:
            raise errors.invalid(str(error), param=field) from None
        if result.prompt is None:
            decision = result.decision
            raise errors.check_down(decision.stop) if decision.error else errors.blocked("input", decision.categories)
        return result.prompt


def _has_body(scope: Scope) -> bool:
    named = {name.lower(): value for name, value in scope["headers"]}
    return b"transfer-encoding" in named or named.get(b"content-length", b"0").strip() != b"0"


def _require_routes(app: App, paths: Collection[str]) -> None:
    """Raises: ValueError for a path that is not a route of the application, where that can be told."""
    inner: Any = app
    while inner is not None and not isinstance(getattr(inner, "routes", None), list):
        inner = getattr(inner, "app", None)
    if inner is None:
        return
    for path in paths:
        if not _has_route(inner.routes, {"type": "http", "method": "POST", "path": path, "root_path": "", "headers": []}, path):
            known = ", ".join(sorted(str(route.path) for route in inner.routes if hasattr(route, "path")))
            raise ValueError(f"GuardMiddleware.paths must be routes of the application, got {path}. It has {known}.")


def _has_route(routes: Sequence[Any], scope: Scope, written: str) -> bool:
    """Whether one of the routes, or of those that are mounted below them, is written or matches like that."""
    for route in routes:
        path = getattr(route, "path", None)
        if path == written:
            return True
        match, child = route.matches(scope)
        if match == Match.NONE:
            continue
        inner = getattr(route, "routes", None)
        if not inner or _has_route(inner, {**scope, **child}, written.removeprefix(path or "")):
            return True
    return False
