"""A process that serves: uvicorn around the application."""

import sys

import uvicorn

from valign.serving.app import create_app
from valign.serving.service import Service

SWITCH = 0.0005  # seconds after which a computing thread lets the event loop have its turn; Python's 0.005 shows in every answer


def serve(service: Service, *, host: str = "127.0.0.1", port: int = 8000, drain: int = 60, access_log: bool = False) -> None:
    """Listen until SIGTERM or Ctrl-C, then answer what is under way within ``drain`` seconds.

    Raises: what loading the model or the rules raised.
    """
    failures: list[Exception] = []
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service),
            host=host,
            port=port,
            access_log=access_log,
            server_header=False,
            timeout_graceful_shutdown=drain,
        )
    )

    def give_up(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    service.on_failure = give_up
    sys.setswitchinterval(SWITCH)
    server.run()
    if failures:
        raise failures[0]
