"""JSON that clients send: its shape is bounded before it is parsed. A call takes milliseconds, so never on the event loop."""

import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from valign.serving import errors

Body = TypeVar("Body", bound=BaseModel)
MAX_VALUES = 10_000  # items and fields of a body; a request of 64 texts has 65
MAX_NESTING = 32  # levels; a request with images has five
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)  # one without an end goes to the end: linear
NOT_JSON = "The body must be JSON."


def parse(body: bytes) -> Any:
    """The value. Raises: ApiError 400 for what is not JSON, or goes beyond `MAX_VALUES` or `MAX_NESTING`."""
    _check_shape(body)
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise errors.invalid(NOT_JSON, param=None, code="invalid_json") from None


def read(model: type[Body], body: bytes, content_type: str) -> Body:
    """A request of the API. Raises: ApiError 400 that names the first wrong field; it never repeats what was sent."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise errors.invalid("The body must be JSON, sent as application/json.", param=None, code="invalid_json")
    try:
        return model.model_validate(parse(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    except RecursionError:
        raise errors.invalid(NOT_JSON, param=None, code="invalid_json") from None
    param = str(first["loc"][0])[:64] if first["loc"] and isinstance(first["loc"][0], str) else None
    if first["type"] == "extra_forbidden":
        raise errors.invalid("This parameter is not known here.", param=param, code="unknown_parameter")
    raise errors.invalid(f"{param or 'The body'}: {first['msg']}.", param=param)


def _check_shape(body: bytes) -> None:
    bare = STRING.sub(b"", body)
    if bare.count(b",") + bare.count(b"[") + bare.count(b"{") > MAX_VALUES:
        raise errors.invalid(f"The body must have at most {MAX_VALUES} values.", param=None, code="invalid_json")
    depth = 0
    for sign in re.findall(rb"[][{}]", bare):
        depth += 1 if sign in b"[{" else -1
        if depth > MAX_NESTING:
            raise errors.invalid(f"The body must be nested at most {MAX_NESTING} deep.", param=None, code="invalid_json")
