"""Every failure in the form that OpenAI's clients read: status, ``{"error": {"message", "type", "param", "code"}}``."""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

TOO_LARGE = 413  # the body was not read to its end


class ApiError(Exception):
    """An error answer. The message goes to the client: it never repeats what the client sent."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_after: float | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code, **(more or {})}}
        self.headers = {} if retry_after is None else {"retry-after": str(max(1, ceil(retry_after)))}
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"


def invalid(message: str, *, param: str | None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)


def wrong_key() -> ApiError:
    return ApiError(401, "No valid API key. Send one as `Authorization: Bearer KEY`.", code="invalid_api_key")


def unknown_model(known: Sequence[str]) -> ApiError:
    return ApiError(404, f"This model does not exist here. Known: {', '.join(known)}.", code="model_not_found", param="model")


def too_large(limit: int) -> ApiError:
    return ApiError(TOO_LARGE, f"The request's body must have at most {limit} bytes.", code="request_too_large")


def body_too_slow(seconds: float) -> ApiError:
    return ApiError(408, f"The request's body must arrive within {seconds:g} s.", code="request_timeout")


def too_many_requests(seconds: float) -> ApiError:
    return ApiError(
        429, "This key has used up its requests per minute.", code="rate_limit_exceeded", kind="requests", retry_after=seconds
    )


def overloaded(seconds: float) -> ApiError:
    return ApiError(503, "All places in the queue are taken.", code="overloaded", kind="server_error", retry_after=seconds)


def not_ready() -> ApiError:
    return ApiError(503, "The models are not loaded yet.", code="not_ready", kind="server_error", retry_after=5)


def timed_out(seconds: float) -> ApiError:
    return ApiError(504, f"Not done within {seconds:g} s.", code="timeout", kind="server_error")


def check_down(stage: str) -> ApiError:
    """A check failed to run, so nothing is let through."""
    message = f"The check `{stage}` is not available, so nothing can be let through."
    return ApiError(503, message, code="check_unavailable", kind="server_error", retry_after=5)


def canary_wrong() -> ApiError:
    """A check gave a wrong answer to what is known, so none of its answers counts."""
    message = "A check fails on known cases, so nothing can be let through. The server's log says which."
    return ApiError(503, message, code="check_unavailable", kind="server_error", retry_after=60)


def model_down() -> ApiError:
    return ApiError(503, "The model does not answer.", code="model_unavailable", kind="server_error", retry_after=30)


def log_down() -> ApiError:
    message = "The audit log cannot be written, so nothing can be let through."
    return ApiError(503, message, code="audit_unavailable", kind="server_error", retry_after=5)


def head_too_large(limit: int) -> ApiError:
    return ApiError(431, f"The request's head must have at most {limit} bytes.", code="request_too_large")


def failed() -> ApiError:
    return ApiError(500, "The request failed here; the log says why.", code="internal_error", kind="server_error")


def blocked(stage: str, categories: Sequence[str]) -> ApiError:
    """Refused by the policy. ``stage`` is ``"input"`` (the prompt) or ``"output"`` (every image)."""
    what = "prompt" if stage == "input" else "image"
    return ApiError(
        400,
        f"The {what} was blocked by this server's policy.",
        code="moderation_blocked",
        kind="image_generation_user_error",
        more={"moderation_details": {"moderation_stage": stage, "categories": list(categories)}},
    )
