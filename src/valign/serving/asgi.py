"""Parts of ASGI middleware: its types, reading a whole body and replaying it, an error as an answer."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from valign.serving import errors

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


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


async def answer(error: errors.ApiError, send: Send) -> None:
    headers = [(b"content-type", b"application/json"), *((k.encode(), v.encode()) for k, v in error.headers.items())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error.body).encode()})
