"""The routes: OpenAI's moderations and image generations, health, metrics. Parse, ask the service, answer."""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from valign.checks import UserError
from valign.serving import errors, generations, moderations
from valign.serving.gate import Gate
from valign.serving.json_body import Body, read
from valign.serving.metrics import CONTENT_TYPE_LATEST
from valign.serving.schemas import (
    ErrorAnswer,
    ImageAnswer,
    ImageRequest,
    ModelEntry,
    ModelList,
    ModerationAnswer,
    ModerationRequest,
)
from valign.serving.service import Caller, Service

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": "OpenAI's form of an error"} for status in ("4XX", "5XX")
}
STARTED = int(time.time())


def _takes(model: type[BaseModel]) -> dict[str, Any]:
    """The description of a route whose body is read off the event loop, so that FastAPI does not see it."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


api = APIRouter(prefix="/v1", responses=ERRORS, dependencies=[Depends(HTTPBearer(auto_error=False))])
health = APIRouter()


def create_app(service: Service) -> FastAPI:
    """An ASGI application around a service, which it starts and stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        with _reloading_on_hangup(service):
            yield
        await service.stop()

    app = FastAPI(title="valign", version=version("valign"), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_exception_handler(HTTPException, lambda request, error: _respond(_http(error)))
    app.add_exception_handler(errors.ApiError, lambda request, error: _respond(error))
    app.include_router(api)
    app.include_router(health)
    app.add_middleware(Gate, service=service)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


@api.get("/models")
async def models(request: Request) -> ModelList:
    """The names that the model answers to."""
    return ModelList(data=[ModelEntry(id=name, created=STARTED) for name in _service(request).settings.names])


@api.post("/moderations", openapi_extra=_takes(ModerationRequest))
async def moderation(request: Request) -> ModerationAnswer:
    """Judge texts, or one message of texts and images."""
    service, caller = _service(request), _caller(request)
    body = await _read(ModerationRequest, request)
    with _prompt_errors("input"):
        return await moderations.moderate(service, caller, body)


@api.post("/images/generations", openapi_extra=_takes(ImageRequest))
async def generation(request: Request) -> ImageAnswer:
    """Generate images of a prompt, or of its safe rewrite; those that passed every check are handed out."""
    service, caller = _service(request), _caller(request)
    body = await _read(ImageRequest, request)
    service.limit.take(caller.name, body.n or 1, counted=1)
    with _prompt_errors("prompt"):
        return await generations.generate(service, caller, body)


@health.get("/healthz")
async def alive() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@health.get("/readyz", responses={503: {"description": "still loading, or a check fails on known cases"}})
async def ready(request: Request, response: Response) -> dict[str, Any]:
    """The models are loaded and warm; which rules are at work."""
    service = _service(request)
    if not service.ready:
        response.status_code = 503
        return {"status": f"not served: {service.wrong}" if service.wrong else "loading"}
    policy = service.rules.guard.policy
    return {
        "status": "ready",
        "policy": policy.id,
        "policy_sha256": policy.fingerprint(),
        "reload": "failed, see the log" if service.reload_failed else "ok",
    }


@health.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    return Response(_service(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def _read(model: type[Body], request: Request) -> Body:
    return await _service(request).parse(read, model, await request.body(), request.headers.get("content-type", ""))


def _described(app: FastAPI) -> dict[str, Any]:
    """OpenAPI's description, with the bodies that `_takes` names."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        bodies = models_json_schema(
            [(ModerationRequest, "validation"), (ImageRequest, "validation")], ref_template="#/components/schemas/{model}"
        )[1]
        found["components"]["schemas"] |= bodies["$defs"]
        app.openapi_schema = found
    return app.openapi_schema


def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


def _caller(request: Request) -> Caller:
    found: Caller = request.state.caller
    return found


@contextmanager
def _prompt_errors(param: str) -> Iterator[None]:
    """Turn what the guard refuses as a prompt into the client's error."""
    try:
        yield
    except UserError as error:
        raise errors.invalid(str(error), param=param) from None


@contextmanager
def _reloading_on_hangup(service: Service) -> Iterator[None]:
    """SIGHUP reloads policy and keys, where there is such a signal and this is the main thread."""
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[bool]]()

    def reload() -> None:
        tasks.add(task := asyncio.create_task(service.reload()))  # a task without a reference may be collected
        task.add_done_callback(tasks.discard)

    with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError, ValueError):
        loop.add_signal_handler(signal.SIGHUP, reload)
    yield


def _respond(error: errors.ApiError) -> Response:
    return Response(json.dumps(error.body), error.status, error.headers, media_type="application/json")


def _http(error: HTTPException) -> errors.ApiError:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    found = errors.ApiError(error.status_code, f"{error.detail}.", code=code)
    found.headers |= dict(error.headers or {})
    return found
