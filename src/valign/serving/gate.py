"""ASGI middleware around all routes: request id, API key, rate, limits on body and time, metrics, and errors as answers."""

import asyncio
import logging
import secrets
from itertools import count
from time import perf_counter

from valign.serving import errors
from valign.serving.asgi import App, Message, Receive, Scope, Send, answer, hung_up, read_body, route_path, with_body
from valign.serving.batching import HungError
from valign.serving.service import Caller, Service

LOG = logging.getLogger(__name__)
GUARDED = "/v1/"  # routes below it need a key
TAKING = ("/v1/moderations", "/v1/images/generations")  # routes with a body
ROUTES = (*TAKING, "/v1/models", "/healthz", "/readyz", "/metrics", "/openapi.json")
PAGE, PAGE_BODY = "/playground", 2**18  # what the page sends is small, and it asks for the key itself
NO_BODY = 2**14  # bytes of a body that no route asked for
HUNG_UP = 499  # in the metrics: nobody was there any more to get an answer


class ClientGone(Exception):
    """The client closed its connection before it had an answer."""


class Gate:
    """ASGI middleware. Every body is read here, within limits of size and time: a large one for known routes and valid keys alone.

    Every request with a key counts against the key's rate, also one that is refused afterwards. A request ends with its client, and
    with its key.
    """

    def __init__(self, app: App, service: Service) -> None:
        self._app, self._service = app, service
        self._series, self._number = secrets.token_hex(8), count()  # ids differ between starts of the server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, path = perf_counter(), 0, route_path(scope)
        request = f"req_{self._series}{next(self._number):x}"

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request.encode())]
            await send(message)

        try:
            posted = scope["method"] == "POST"
            if path.startswith(GUARDED):
                caller = Caller(self._authorize(scope), request)
                scope.setdefault("state", {})["caller"] = caller
                if posted:
                    self._service.limit.take(caller.name)
                most = self._service.settings.max_body if posted and path in TAKING else NO_BODY
                await self._run(scope, await self._body(scope, receive, most), receive, send_marked, caller)
            else:
                body = await self._body(scope, receive, PAGE_BODY if path.startswith(PAGE) else NO_BODY)
                await self._app(scope, with_body(body, receive), send_marked)  # the page holds connections open: no limit of time
        except ClientGone:
            status = HUNG_UP
        except Exception as error:
            explained = self._explain(error, request)
            if status == 0:
                await answer(explained, send_marked, rest=receive if explained.status == errors.TOO_LARGE else None)
        finally:
            route = path if path in ROUTES else "other"
            self._service.metrics.requests.labels(route, status).inc()
            self._service.metrics.seconds.labels(route).observe(perf_counter() - start)

    async def _body(self, scope: Scope, receive: Receive, limit: int) -> bytes:
        """The body. Raises: ApiError 413 beyond the limit, at once where the head says so; 408 where it comes too slowly."""
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said) > limit:
            raise errors.too_large(limit)
        return await read_body(receive, limit=limit, seconds=self._service.settings.body_timeout)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send, caller: Caller) -> None:
        """The application, until it answered, its time is up, its client hung up, or its key was taken away.

        Raises: ClientGone; TimeoutError; ApiError 401; whatever the application raises.
        """
        gone = asyncio.create_task(hung_up(receive))
        work = asyncio.ensure_future(self._app(scope, with_body(body, lambda: asyncio.shield(gone)), send))
        try:
            with self._service.sessions.open(caller.name) as ended:
                await asyncio.wait((work, gone, ended), timeout=self._service.settings.timeout, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    work.result()
                elif ended.done():
                    raise errors.wrong_key()
                else:
                    raise ClientGone if gone.done() else TimeoutError
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait((work,))  # it writes into the log what became of it

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
        return errors.model_down() if isinstance(error, HungError) else errors.failed()
