"""A process that serves: uvicorn around the application."""

import gc
import sys

import uvicorn
from fastapi import FastAPI

from valign.serving.service import Service

SWITCH = 0.0005  # seconds between switches of threads; Python's 0.005 delays every answer


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
