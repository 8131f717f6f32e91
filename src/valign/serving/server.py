"""A process that serves: uvicorn around the application."""

import gc
import json
import sys

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from valign.serving import errors
from valign.serving.service import Service

MAX_HEAD = 2**15  # bytes of a request's line and headers, and of what follows its body
SWITCH = 0.0005  # seconds between switches of threads; Python's 0.005 delays every answer


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol with a limit on headers: httptools has none, and copies a header anew for each piece that arrives.

    What arrives may be at most `MAX_HEAD` bytes without completing the headers, a piece of the body or the request.
    """

    _unread = 0  # bytes since the last of these

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        super().data_received(data)
        if self._unread > MAX_HEAD and not self.transport.is_closing():
            refused = errors.head_too_large(MAX_HEAD)
            body = json.dumps(refused.body).encode()
            head = f"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}content-type: application/json\r\n\r\n".encode() + body)
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._unread = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        super().on_message_complete()


def serve(app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000, drain: int = 60, access_log: bool = False) -> None:
    """Listen until SIGTERM or Ctrl-C, then finish what is under way within ``drain`` seconds.

    Args: app: Made by `valign.serving.app.create_app`.
    Raises: what loading the model or the rules raised.
    """
    failures: list[Exception] = []
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            access_log=access_log,
            server_header=False,
            http=BoundedHttp,
            timeout_graceful_shutdown=drain,
        )
    )

    def give_up(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    service: Service = app.state.service
    service.on_failure, service.on_ready = give_up, _settle
    server.run()
    if failures:
        raise failures[0]


def _settle() -> None:
    """Shorter pauses: switch threads sooner, and exempt the models' objects from garbage collection."""
    sys.setswitchinterval(SWITCH)
    gc.collect()
    gc.freeze()
