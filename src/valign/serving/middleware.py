"""ASGI middleware that puts the guard before any application: JSON bodies go on with safe prompts, or not at all."""

import asyncio
import json
from collections.abc import Collection, Sequence
from typing import Any

from valign.checks import UserError
from valign.guard.guard import Guard
from valign.serving import errors
from valign.serving.asgi import App, Receive, Scope, Send, answer, read_body, with_body

HARMLESS = ("GET", "HEAD", "OPTIONS")  # methods without a body


class GuardMiddleware:
    """``app.add_middleware(GuardMiddleware, guard=guard, paths=["/generate"])``, or around any ASGI application.

    A body must be a JSON object with text in at least one of ``fields``, and every one that it has is guarded: what the guard
    cannot read does not get through. Answers of its own are OpenAI's errors: 400 for a blocked prompt, 503 where a check is down.

    Args:
        paths: Exact paths that take prompts; all others pass unread.
        fields: Of the body that an image is generated from.
        max_body: Bytes.
        body_timeout: Seconds in which a body must have come.
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
    ) -> None:
        if not paths or not fields:
            raise ValueError("GuardMiddleware must have paths and fields to guard, got none. Name them.")
        self._app, self._guard, self._paths, self._fields = app, guard, frozenset(paths), tuple(fields)
        self._max_body, self._body_timeout = max_body, body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in self._paths or scope["method"] in HARMLESS:
            await self._app(scope, receive, send)
            return
        try:
            body = await self._guarded(await read_body(receive, limit=self._max_body, seconds=self._body_timeout))
        except errors.ApiError as error:
            await answer(error, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        await self._app(scope, with_body(body, receive), send)

    async def _guarded(self, body: bytes) -> bytes:
        """The body with safe prompts, written anew: another parser might read other words in unusual JSON."""
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise errors.invalid("The body must be a JSON object.", param=None, code="invalid_json")
        fields = [field for field in self._fields if data.get(field) is not None]
        if not fields:
            raise errors.invalid(f"{self._fields[0]} is missing.", param=self._fields[0])
        safe = {field: await asyncio.to_thread(self._prompt, data[field], field) for field in fields}
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
