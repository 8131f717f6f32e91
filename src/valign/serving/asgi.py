"""Parts of ASGI middleware: its types, reading a whole body and replaying it, an error as an answer."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from valign.serving import errors

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LINGER = 2.0  # seconds


async def read_body(receive: Receive, *, limit: int, seconds: float) -> bytes:
    """The whole body. Raises: ApiError 413 beyond ``limit`` bytes, 408 if it has not come after ``seconds``."""
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            more = True
            while more:
                message = await receive()
                body += message.get("body", b"")
                more = message["type"] == "http.request" and message.get("more_body", False)
                if len(body) > limit:
                    raise errors.too_large(limit)
    except TimeoutError:
        raise errors.body_too_slow(seconds) from None
    return bytes(body)


def with_body(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that returns this body first."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


def route_path(scope: Scope) -> str:
    """The address as a router sees it: without the root path, where a server or a mount put one before it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


async def hung_up(receive: Receive) -> Message:
    """Wait until the client closes its connection; what it still sends is dropped."""
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message


async def answer(error: errors.ApiError, send: Send, *, rest: Receive | None = None) -> None:
    """Send the error. With ``rest``, what the client is still sending is then read and dropped for a while.

    A client that is in the middle of a long body would otherwise see a closed connection instead of its answer.
    """
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": rest is not None})
    if rest is not None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while (message := await rest())["type"] == "http.request" and message.get("more_body", False):
                    pass
        await send({"type": "http.response.body"})
