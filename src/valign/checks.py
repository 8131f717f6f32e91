"""Checks of input, in one sentence form: *who* must be *what*, got *what*. What to do."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from math import inf, isfinite
from typing import Any, TypeVar

Options = TypeVar("Options")


class UserError(ValueError):
    """A mistake that the user can mend; the command line prints it as one line, without a traceback."""


def check_range(
    name: str, value: float, *, above: float | None = None, low: float = -inf, high: float = inf, hint: str = ""
) -> None:
    """Raise ValueError unless ``low <= value <= high`` (or ``above < value <= high``) and ``value`` is finite."""
    left = f"[{low:g}" if above is None else f"({above:g}"
    if not (isfinite(value) and (value >= low if above is None else value > above) and value <= high):
        raise ValueError(f"{name} must be in {left}, {high:g}{')' if high == inf else ']'}, got {value!r}. {hint}".rstrip())


def check_choice(name: str, value: object, choices: Collection[object], *, hint: str = "") -> None:
    """Raise ValueError unless ``value`` is one of ``choices``, which the message lists."""
    if value not in choices:
        listed = ", ".join(str(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}; got {value!r}. {hint}".rstrip())


def read_options(kind: type[Options], options: Mapping[str, Any], *, name: str = "") -> Options:
    """The dataclass ``kind`` of ``options``, each in its field's type: 8 becomes a float where one is declared, and a list a tuple.

    Args:
        name: What a message calls it; the class's own name if left out.
    Raises: UserError for a value of the wrong type, and for what ``kind`` itself refuses.
    """
    from pydantic import TypeAdapter, ValidationError  # slow to import

    try:
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # of `check_range` and its like, which name the value
            raise UserError(first["msg"].removeprefix("Value error, ")) from error
        where = ".".join([name or kind.__name__, *map(str, first["loc"])])
        raise UserError(f"{where}: {first['msg']}, got {first['input']!r}.") from error


def with_options(base: Options, changes: Mapping[str, Any]) -> Options:
    """The dataclass ``base`` with those ``changes`` that are fields of it, read as `read_options` does."""
    own = {item.name for item in fields(base)}  # type: ignore[arg-type]
    return read_options(type(base), vars(base) | {name: value for name, value in changes.items() if name in own})
