"""ASGI middleware around all routes: request id, API key, limits on body and time, metrics, and errors as answers."""

import asyncio
import logging
import secrets
from itertools import count
from time import perf_counter

from valign.serving import errors
from valign.serving.asgi import App, Message, Receive, Scope, Send, answer, read_body, with_body
from valign.serving.service import Caller, Service

LOG = logging.getLogger(__name__)
GUARDED = "/v1/"  # routes below it need a key
ROUTES = ("/v1/moderations", "/v1/images/generations", "/v1/models", "/healthz", "/readyz", "/metrics", "/openapi.json")


class Gate:
    """ASGI middleware. The body is read here, within its limits of size and time, and only for a caller with a valid key."""

    def __init__(self, app: App, service: Service) -> None:
        self._app, self._service = app, service
        self._series, self._number = secrets.token_hex(8), count()  # ids differ between starts of the server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = perf_counter(), 0
        request = f"req_{self._series}{next(self._number):x}"

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request.encode())]
            await send(message)

        try:
            limit = None  # of time: the playground holds connections open
            if scope["path"].startswith(GUARDED):
                scope.setdefault("state", {})["caller"] = Caller(self._authorize(scope), request)
                limit = self._service.settings.timeout
            if scope["method"] == "POST":
                limits = self._service.settings
                body = await read_body(receive, limit=limits.max_body, seconds=limits.body_timeout)
                receive = with_body(body, receive)
            async with asyncio.timeout(limit):
                await self._app(scope, receive, send_marked)
        except Exception as error:
            explained = self._explain(error, request)
            if status == 0:
                await answer(explained, send_marked)
        finally:
            route = scope["path"] if scope["path"] in ROUTES else "other"
            self._service.metrics.requests.labels(route, status).inc()
            self._service.metrics.seconds.labels(route).observe(perf_counter() - start)

    def _authorize(self, scope: Scope) -> str:
        """The name of the key's owner. Raises: ApiError 401, or 503 before the keys are read."""
        given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        kind, _, key = given.partition(" ")
        name = self._service.rules.keys.name_of(key.strip() if kind.lower() == "bearer" else "")
        if name is None:
            raise errors.wrong_key()
        return name

    def _explain(self, error: Exception, request: str) -> errors.ApiError:
        if isinstance(error, errors.ApiError):
            return error
        if isinstance(error, TimeoutError):
            return errors.timed_out(self._service.settings.timeout)
        LOG.error("%s failed: %s", request, type(error).__name__, exc_info=error)
        return errors.failed()
