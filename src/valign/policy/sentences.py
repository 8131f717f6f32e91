"""Turn a schema error into a place in the document and a sentence: *what* must be *what*, got *what*."""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from valign.checks import close_to
from valign.policy.schema import Policy
from valign.policy.yaml_lines import NodePath

_MUST: Mapping[str, str] = {
    "string_type": "be text",
    "bool_type": "be true or false",
    "int_type": "be a whole number",
    "float_type": "be a number",
    "list_type": "be a list",
    "model_type": "be a mapping of keys to values",
    "finite_number": "be a finite number",
    "string_too_short": "not be empty",
    "greater_than_equal": "be at least {ge}",
    "less_than_equal": "be at most {le}",
    "literal_error": "be one of {expected}",
    "too_short": "hold at least {min_length} entry",
    "string_pattern_mismatch": "be lower-case words joined by hyphens, such as street-fight",
}


def sentence(error: ErrorDetails, data: Any) -> tuple[NodePath, str]:
    """Where the error stands (a place that the document has) and what to say of it."""
    place, kind = tuple(error["loc"]), error["type"]
    if kind == "missing":
        return place[:-1], f"{_name(place[:-1], data)} lacks the key {place[-1]!r}. {_example(place)}".rstrip()
    if kind == "extra_forbidden":
        keys = tuple(_model_at(place[:-1]).model_fields)
        if len(place) == 1:
            keys += ("remove",)
        guess = close_to(place[-1], keys)
        return place, f"{_name(place[:-1], data)} has an unknown key {place[-1]!r}.{guess} Known keys: {', '.join(keys)}."
    value = error["input"]
    if kind == "value_error":
        return place, f"{_name(place, data)} {error['ctx']['error']}."
    must = _MUST.get(kind)
    what = f"must {must.format(**error.get('ctx', {}))}" if must else f"is wrong ({error['msg']})"
    hint = " Put it in quotes." if kind == "string_type" and isinstance(value, bool | int | float) else ""
    return place, f"{_name(place, data)} {what}, got {_show(value)}.{hint}"


def _name(place: NodePath, data: Any) -> str:
    """``categories[violence].safe_prompt``: ids instead of indices."""
    if not place:
        return "the policy"
    text = ""
    for step in place:
        data = (
            data[step] if (isinstance(data, list) and isinstance(step, int)) else data.get(step) if isinstance(data, dict) else None
        )
        if isinstance(step, int):
            label = data.get("id", step) if isinstance(data, dict) else step
            text += f"[{label}]"
        else:
            text += f".{step}" if text else step
    return text


def _model_at(place: NodePath) -> type[BaseModel]:
    """The schema class that the mapping at ``place`` is checked against."""
    model: type[BaseModel] = Policy
    for step in place:
        if isinstance(step, str):
            annotation: Any = model.model_fields[step].annotation
            while get_args(annotation):
                annotation = get_args(annotation)[0]
            model = annotation
    return model


def _example(place: NodePath) -> str:
    field = _model_at(place[:-1]).model_fields[str(place[-1])]
    return {"id": "Give a name of its own, such as my-site.", "version": "Write `version: 1`."}.get(
        str(place[-1]), "Write a line of text." if field.annotation is str else ""
    )


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "an empty list" if not value else "a list"
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
