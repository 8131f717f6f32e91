"""Checks of input, in one sentence form: *who* must be *what*, got *what*. What to do."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from math import inf, isfinite
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Options = TypeVar("Options")
SEEDS = (-(2**63), 2**64 - 1)  # lowest and highest that torch takes


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
        raise ValueError(f"{name} must be one of {listed}; got {value!r}.{close_to(value, choices)} {hint}".rstrip())


def close_to(value: object, choices: Iterable[object]) -> str:
    """`` Did you mean ...?`` with the choice that is spelt most like ``value``; empty if none is."""
    near = get_close_matches(str(value), list(map(str, choices)), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def first_line(error: Exception) -> str:
    """The first line of an error's message without its full stop, or the name of its class."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What one field of a dataclass was declared with; `check_options` and the command line read it."""

    type: Any  # without None; see `optional`
    optional: bool  # None is allowed
    default: Any  # MISSING where a function makes it
    help: str = ""
    low: float = -inf
    high: float = inf
    above: float | None = None
    choices: Collection[object] = ()
    hint: str = ""
    flags: tuple[str, ...] = ()  # on the command line, where they are not the field's name
    none: object = None  # what stands for None on the command line
    rare: bool = False  # on the command line only by ``--set`` and ``--config``
    needs: Mapping[str, tuple[object, ...]] = field(default_factory=dict)  # what it depends on, see `option`


def option(default: Any, **declared: Any) -> Any:
    """A field of a dataclass whose range, help and default are declared here, once; `check_options` and the command line read them.

    Args:
        default: The value, or a function without arguments that makes it (``dict``).
        declared: ``help``, the range (``low``, ``high``, ``above``), ``choices``, ``hint`` for a message, ``flags``, ``none`` and
            ``rare``, as in `Declared`. A `Literal` type needs no choices. ``needs``: other fields of the dataclass, with the values
            of which one makes this field take effect; ``()`` stands for any that is not empty, 0 or None. See `refuse_idle`.
    """
    metadata = {"option": declared}
    return field(default_factory=default, metadata=metadata) if callable(default) else field(default=default, metadata=metadata)


def declared_options(kind: type[Any]) -> dict[str, Declared]:
    """How each field of the dataclass ``kind`` that is an `option` was declared, by name and in order."""
    hints, found = get_type_hints(kind), {}
    for item in (one for one in fields(kind) if "option" in one.metadata):
        inner = [part for part in get_args(hints[item.name]) if part is not type(None)]
        optional = len(inner) < len(get_args(hints[item.name]))
        plain = inner[0] if optional and len(inner) == 1 else hints[item.name]
        literal = {"choices": get_args(plain)} if get_origin(plain) is Literal else {}
        found[item.name] = Declared(type=plain, optional=optional, default=item.default, **literal | item.metadata["option"])
    return found


def check_options(options: object) -> None:
    """Raise ValueError unless every `option` of a dataclass is in the range, or one of the choices, that it was declared with."""
    for name, declared in declared_options(type(options)).items():
        _check_option(f"{type(options).__name__}.{name}", getattr(options, name), declared)


def refuse_idle(options: object, given: Collection[str] | None = None) -> None:
    """Refuse an option that changes nothing beside the others.

    An option at its default asks for nothing, so that a file with all options can be read back.

    Args: given: Fields that somebody set, where a preset may have set others; all if left out.
    Raises: UserError that names the option and what it needs.
    """
    usual = {item.name: item for item in fields(options)}  # type: ignore[arg-type]
    for name, one in declared_options(type(options)).items():
        made: Any = usual[name].default_factory
        if (given is not None and name not in given) or getattr(options, name) == (one.default if made is MISSING else made()):
            continue
        for other, values in one.needs.items():
            value = getattr(options, other)
            if (value not in values) if values else not value:
                wanted = " or ".join(map(repr, values)) if values else "set"
                raise UserError(
                    f"{type(options).__name__}.{name} has no effect unless {other} is {wanted}, got {other} {value!r}. "
                    f"Leave out {name}, or change {other}."
                )


def _check_option(name: str, value: Any, declared: Declared) -> None:
    if value is None and declared.optional:
        return
    if declared.choices:
        check_choice(name, value, declared.choices, hint=declared.hint)
    elif (declared.above, declared.low, declared.high) != (None, -inf, inf):
        limits: dict[str, Any] = {"above": declared.above, "low": declared.low, "high": declared.high}
        check_range(name, value, **limits, hint=declared.hint)


def read_options(kind: type[Options], options: Mapping[str, Any], *, name: str = "") -> Options:
    """The dataclass ``kind`` of ``options``, each in its field's type: 8 becomes a float where one is declared, and a list a tuple.

    Args:
        name: What a message calls it; the class's own name if left out.
    Raises: UserError for a value of the wrong type, and for what ``kind`` itself refuses.
    """
    return _read(kind, dict(options), name or kind.__name__)


def read_changes(kind: type[Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Some fields of the dataclass ``kind`` in their types, each checked by its own declaration.

    What they may be together is not asked: the others' values are not known yet.
    Raises: UserError for a value of the wrong type or out of range.
    """
    hints, declared, found = get_type_hints(kind), declared_options(kind), {}
    for name, value in changes.items():
        if isinstance(value, str) and get_origin(declared[name].type) is tuple:
            value = [value]  # a list of one, written alone
        found[name] = _read(hints[name], value, f"{kind.__name__}.{name}")
        try:
            _check_option(f"{kind.__name__}.{name}", found[name], declared[name])
        except ValueError as error:
            raise UserError(str(error)) from error
    return found


def _read(kind: Any, value: object, name: str) -> Any:
    """``value`` in the type ``kind``. Raises: UserError that calls it ``name``."""
    from pydantic import TypeAdapter, ValidationError  # slow to import

    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # of `check_range` and its like, which name the value
            raise UserError(first["msg"].removeprefix("Value error, ")) from error
        where = ".".join([name, *map(str, first["loc"])])
        raise UserError(f"{where}: {first['msg']}, got {first['input']!r}.") from error


def with_options(base: Options, changes: Mapping[str, Any]) -> Options:
    """The dataclass ``base`` with those ``changes`` that are fields of it, read as `read_options` does."""
    own = {item.name for item in fields(base)}  # type: ignore[arg-type]
    return read_options(type(base), vars(base) | {name: value for name, value in changes.items() if name in own})
