"""Options that config dataclasses give to a command: each field is one option, and ``--config`` and ``--set`` take them all.

A command declares its parts with `configured` and asks with `record` or `changes` for what was given. A part is a dataclass, or
the place of one as ``"module:Class"``, which is imported only when the command is asked for, so that other help stays quick.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from inspect import Parameter, Signature
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from valign.checks import Declared, UserError, close_to, declared_options, read_changes, refuse_idle
from valign.cli.common import numbers_by_name, setting
from valign.cli.early import Check, named_places, own_paths, refuse_layout, refuse_other_tables, refuse_values
from valign.cli.quick import (
    FROM_ELSEWHERE,
    chosen_rows,
    fields_of,
    given_values,
    own_words,
    refuse_missing,
    refuse_out_of_range,
    refuse_settings,
    refuse_unknown,
    table_names,
    typed_fields,
)
from valign.memory import MemoryConfig

Kind = TypeVar("Kind")
Early = Callable[[Mapping[str, Any], Mapping[str, Sequence[str]]], None]
GIVEN = "valign.given"  # where a context keeps what `record` and `changes` read


def configured(
    *,
    rest: str = "",
    rest_from: tuple[str, ...] = (),
    preset: bool = False,
    typed: Mapping[str, tuple[str, ...]] | None = None,
    pipeline: bool = False,
    models: tuple[str, ...] = (),
    named: Mapping[str, Sequence[str]] | None = None,
    checks: Mapping[str, Check] | None = None,
    early: Early | None = None,
    **parts: type[Any] | str,
) -> type[Any]:
    """A command class, for ``app.command(cls=...)``, whose further options are the fields of ``parts`` that `option` declares.

    A field has the first part's plain name, ``--steps``; a later part with a field of that name has ``--PART-steps``. An option
    that the command declares itself comes first. In files and ``--set`` a name may be written PART.NAME.

    Args:
        rest: What other names belong to, such as "the method"; `rest_of` returns them. Empty: other names are refused.
        rest_from: Folders of valign in which these names are declared, where they are, so that a misspelt one is refused early.
        preset: The defaults are a preset's, not the dataclasses' own, so help does not show these.
        typed: Fields that are options of their own, by part, instead of all that are not ``rare``. The others are left to
            ``--set`` and ``--config``.
        pipeline: ``--model`` names a diffusion model: a name that cannot be one is refused before anything is imported.
        models: Further names that ``--model`` may have then.
        named: Flags of the command that take names, and what has them, as in `valign.cli.early.refuse_values`.
        checks: Flags of the command and what refuses their values, in the place of what all commands have.
        early: Refuses what several options together show, before anything is imported that takes seconds: it is called with the
            command's own parameters, and with the values that were typed for the flags of the parts and of `FROM_ELSEWHERE`.
    """
    given = {
        "parts": parts,
        "rest": rest,
        "rest_from": rest_from,
        "preset": preset,
        "typed": typed or {},
        "pipeline": pipeline,
        "models": models,
        "named": named or {},
        "checks": checks or {},
        "early": staticmethod(early) if early else None,
    }
    return type("Configured", (Configured,), given)


def record(ctx: typer.Context, kind: type[Kind], **over: Any) -> Kind:
    """The part of this dataclass with what was given, its own defaults otherwise, and ``over`` above both.

    Raises: UserError for an option that was given and has no effect beside the others.
    """
    given = changes(ctx, kind)
    made = kind(**given | over)
    refuse_idle(made, given)
    return made


def changes(ctx: typer.Context, *kinds: type[Any]) -> dict[str, Any]:
    """What was given for the parts of these dataclasses, by field: nothing that was left out."""
    return {name: value for kind in kinds for name, value in ctx.meta[GIVEN][kind].items()}


def rest_of(ctx: typer.Context) -> dict[str, Any]:
    """What was given under names that are not fields of any part."""
    return dict(ctx.meta[GIVEN][None])


def refuse_given(ctx: typer.Context, why: str, *names: str, parts: Collection[type[Any]] = ()) -> None:
    """Refuse options that were given and have no effect here.

    Args:
        why: Where they have none, for the message: ``"on the task chat"``.
        names: Of the command's own parameters, and of fields of its parts.
        parts: Dataclasses none of whose fields has an effect.
    Raises: UserError that names the option as it is typed.
    """
    own = {item.name: item.opts[0] for item in ctx.command.params}
    typed = (name for name in names if (source := ctx.get_parameter_source(name)) is not None and source.name != "DEFAULT")
    found = [own[name] for name in typed]
    if isinstance(ctx.command, Configured):
        for part, kind in ctx.command.kinds().items():
            given = ctx.meta[GIVEN][kind]
            found += [ctx.command.as_typed(part, name) for name in given if name in names or kind in parts]
    if found:
        raise UserError(f"{found[0]} has no effect {why}. Leave it out.")


class TableGroup(TyperGroup):
    """A command for each row of a table ``"module:TABLE"``, made when it is asked for, so that other help stays quick.

    A name that is not there, and what `Configured.refuse_early` can tell, is refused before the table's module is imported.
    """

    table: str
    make: Callable[[str], Any]  # name -> command; a static method
    sketch: Callable[[str], Any]  # the same with parts by their places, without help and without importing them; a static method

    def list_commands(self, ctx: Any) -> list[str]:
        return [*table_names(self.table), *self.commands]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in table_names(self.table):
            return type(self).make(cmd_name)
        known = self.list_commands(ctx)
        if cmd_name not in known:
            raise UserError(f"No such command: {cmd_name}.{close_to(cmd_name, known)} `--help` lists all.")
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in table_names(self.table):
            try:
                command = type(self).sketch(args[0])
            except LookupError:  # of another package, whose source is not read
                command = None
            if command:
                command.refuse_early(args[0], args[1:], ctx)
        return super().resolve_command(ctx, args)


class Configured(TyperCommand):
    """A command with generated options, made when they are first asked for."""

    context_class = typer.Context

    parts: Mapping[str, type[Any] | str]
    rest: str
    rest_from: tuple[str, ...]
    preset: bool
    typed: Mapping[str, tuple[str, ...]]
    pipeline: bool
    models: tuple[str, ...]
    named: Mapping[str, Sequence[str]]
    checks: Mapping[str, Check]
    early: Early | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sources: dict[str, tuple[str, str]] = {}  # generated parameter -> part and field

    def kinds(self) -> dict[str, type[Any]]:
        """The parts' dataclasses, imported."""
        return {name: _imported(part) if isinstance(part, str) else part for name, part in self.parts.items()}

    def get_params(self, ctx: Any) -> list[Any]:
        if not self.sources:
            self.params.extend(self._generated())
        return super().get_params(ctx)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """What can be refused without the parts is refused first: importing them takes seconds."""
        if not self.sources and not extra.get("resilient_parsing"):
            self.refuse_early(info_name, args, parent)
        return super().make_context(info_name, args, parent, **extra)

    def refuse_early(self, info_name: str | None, args: Sequence[str], parent: Any = None) -> None:
        """Refuse what can be told from the words and the source alone; the parts are not imported. Raises: UserError."""
        if {"--help", "-h"} & set(args):
            return
        own = [flag for parameter in self.params for flag in (*parameter.opts, *parameter.secondary_opts)]
        refuse_unknown(args, own, self.parts, self.typed, rest=bool(self.rest), rest_from=self.rest_from)
        known = typed_fields(self.parts, self.typed, own)
        refuse_other_tables(args, [*own, *known])
        others = {"--model", "-m"} if not self.pipeline and "--model" in known else set()  # of an endpoint, say
        refuse_missing(
            args,
            any_model=not self.pipeline or "chat" in args,  # --task chat
            models=self.models,
            texts={*self.checks, *others, *({"--config"} & set(known))},  # a safety config, not a file
        )
        refuse_out_of_range(args, known)
        refuse_settings(args, [fields_of(part) for part in (*self.parts.values(), *chosen_rows(args, self.named))])
        if {"--phased", "--offload"} <= {flag for flag, _ in given_values(args)} & set(known):
            MemoryConfig(phased=True, offload=True)  # says why not
        refuse_values(
            args,
            [*own_paths(self), *(flag for flag, field in known.items() if field.kind == "Path")],
            self.named,
            own=[flag for flag, field in known.items() if field.choices],
            checks={**named_places(self), **({"--format": refuse_layout} if "--format" in known else {}), **self.checks},
            elsewhere=info_name == "estimate" or "--estimate" in args,
        )
        plain = TyperCommand(info_name, params=self.params, context_settings=dict(self.context_settings))
        context = plain.make_context(info_name, own_words(args, known), parent)  # what is missing, and the command's own types
        if self.early:
            given: dict[str, list[str]] = {}
            for flag, value in given_values(args):
                if flag in known or flag in FROM_ELSEWHERE:
                    given.setdefault(flag, []).append(value)
            self.early(context.params, given)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with self._in_own_words():
            return self._parsed(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with self._in_own_words():
            return super().invoke(ctx)

    @contextmanager
    def _in_own_words(self) -> Iterator[None]:
        """A mistake names options as they are typed, whatever the dataclass and its field are called."""
        try:
            yield
        except ValueError as error:
            told = str(error)
            for part, kind in self.kinds().items():
                known = declared_options(kind)
                pattern = rf"\b{kind.__name__}\.({'|'.join(map(re.escape, known)) or '(?!)'})\b"
                pieces = enumerate(re.split(pattern, told))  # text, name, text, name, ...
                told = "".join(self.as_typed(part, piece) if place % 2 else piece for place, piece in pieces)
            told = in_command_words(told, self)
            if told == str(error):
                raise
            raise UserError(told) from error

    def as_typed(self, part: str, name: str) -> str:
        """How an option of a part is given."""
        flag = next((item.opts[0] for item in self.params if item.name == f"{part}__{name}"), "")
        return flag or f"--set {part}.{name}"

    def _parsed(self, ctx: Any, args: list[str]) -> list[str]:
        left = super().parse_args(ctx, args)
        given: dict[tuple[str, str], Any] = {}
        file, settings = ctx.params.pop("config_file"), ctx.params.pop("settings")
        typed = {name: ctx.params.pop(name) for name in self.sources}
        if not ctx.resilient_parsing:
            given |= self._sorted_out(dict(_flat(read_config(file), self.parts)), f"--config {file}") if file else {}
            given |= {self.sources[name]: self._value(name, value) for name, value in typed.items() if value not in (None, [], ())}
            given |= self._sorted_out(dict(map(setting, settings)), "--set")
            found: dict[Any, dict[str, Any]] = {None: {name: value for (part, name), value in given.items() if not part}}
            for part, kind in self.kinds().items():
                found[kind] = read_changes(kind, {name: value for (owner, name), value in given.items() if owner == part})
            ctx.meta[GIVEN] = found
        return left

    def _value(self, name: str, value: Any) -> Any:
        """A typed value as the field has it."""
        part, item = self.sources[name]
        declared = declared_options(self.kinds()[part])[item]
        if get_origin(declared.type) not in (None, tuple, Literal):
            return numbers_by_name(_flags(item, declared)[0], value)
        return None if declared.none is not None and value == declared.none else value

    def _sorted_out(self, values: Mapping[str, Any], origin: str) -> dict[tuple[str, str], Any]:
        """Values by part and field. Raises: UserError that lists every unknown name."""
        known = {part: declared_options(kind) for part, kind in self.kinds().items()}
        found, unknown = {}, []
        for key, value in values.items():
            part, _, name = key.rpartition(".")
            owner = next((one for one in known if name in known[one] and part in ("", one)), "")
            found[(owner, name if owner else key)] = value
            unknown += [] if owner or self.rest else [key]
        if unknown:
            listed = "; ".join(f"{part}: {', '.join(names)}" for part, names in known.items())
            guess = close_to(unknown[0].rpartition(".")[2], [name for names in known.values() for name in names])
            raise UserError(f"{origin} must name options of the command, got {', '.join(unknown)}.{guess} Known: {listed}.")
        return found

    def _generated(self) -> Iterator[Any]:
        """The parameters of all parts, made by typer itself from a signature."""
        taken = {flag for parameter in self.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        made: dict[str, tuple[Any, Any]] = {}
        untyped: list[str] = []
        seen: set[str] = set()
        for part, kind in self.kinds().items():
            for name, declared in declared_options(kind).items():
                flags = _flags(name, declared)
                if not taken.isdisjoint("/".join(flags).split("/")):
                    flags = _flags(f"{part}_{name}", replace(declared, flags=()))
                wanted = name in self.typed.get(part, () if declared.rare else (name,))
                if not wanted or not taken.isdisjoint("/".join(flags).split("/")):
                    untyped.append(f"{part}.{name}" if name in seen else name)
                    continue
                taken.update("/".join(flags).split("/"))
                self.sources[f"{part}__{name}"] = (part, name)
                made[f"{part}__{name}"] = (
                    _annotated(declared, flags, None if self.preset else declared.default, _panel(kind.__name__)),
                    None,
                )
            seen.update(declared_options(kind))
        more = f"; besides the options, {', '.join(untyped)}" if untyped else ""
        panel, file_flag = "From a file", "--config-file" if "--config" in taken else "--config"
        made["config_file"] = (
            Annotated[Path | None, typer.Option(file_flag, help="YAML file of such options", rich_help_panel=panel)],
            None,
        )
        what = f"any such option{f', or one of {self.rest}' if self.rest else ''}; may be repeated{more}"
        made["settings"] = (
            Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help=what, rich_help_panel=panel)],
            [],
        )
        yield from parameters(made)


def in_command_words(text: str, command: TyperCommand) -> str:
    """A message in which ``Class.field`` and ``function.argument`` of valign are the command's own option, or the bare name."""

    def told(match: re.Match[str]) -> str:
        modules = [module for name, module in list(sys.modules.items()) if name.startswith("valign") and module]
        if not any(callable(vars(module).get(match[1])) for module in modules):
            return match[0]
        own = (one.opts[0] for one in command.params if one.name == match[2] and one.opts[0].startswith("-"))
        return next(own, f"--set {match[2]}" if getattr(command, "rest", "") else match[2].replace("_", " "))

    return re.sub(r"\b([A-Za-z]\w*)\.([a-z]\w*)\b(?= (?:must|has no effect))", told, text)


def _imported(place: str) -> type[Any]:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)  # type: ignore[no-any-return]


def _panel(kind: str) -> str:
    """Heading of a part's options in the help: ``SamplingConfig`` is "Sampling options"."""
    name = re.sub("(Config|Options)$", " options", kind)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)


def _flags(name: str, declared: Declared) -> tuple[str, ...]:
    if declared.flags:
        return declared.flags
    plain = name.replace("_", "-")
    return (f"--{plain}/--no-{plain}",) if declared.type is bool and declared.default is not False else (f"--{plain}",)


def _annotated(declared: Declared, flags: tuple[str, ...], default: object, panel: str) -> Any:
    """The type and the option of a field as typer reads them."""
    options: dict[str, Any] = {}
    kind, notes = declared.type, [declared.help]
    if get_origin(kind) is tuple:
        kind = list[get_args(kind)[0]]  # type: ignore[misc]
    elif declared.choices:
        kind = str
        notes.append(f"one of {', '.join(map(str, declared.choices))}")
    elif get_origin(kind) is not None:
        kind, options["metavar"] = list[str], "NAME=NUMBER"
    notes += ["may be repeated"] if get_origin(kind) is list else []
    notes += [f"above {declared.above:g}"] if declared.above is not None else []
    notes += [f"at least {declared.low:g}"] if declared.low != -inf else []
    notes += [f"at most {declared.high:g}"] if declared.high != inf else []
    if isinstance(default, int | float | str | Path) and default != "":
        notes.append(f"default {default}")
    return Annotated[kind | None, typer.Option(*flags, help="; ".join(notes), rich_help_panel=panel, **options)]


def parameters(made: Mapping[str, tuple[Any, Any]]) -> list[Any]:
    """Typer's own parameters of a function with this signature: name -> annotation and default."""

    def function(**_: Any) -> None: ...

    function.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind) for name, (kind, default) in made.items()]
    )
    function.__annotations__ = {name: kind for name, (kind, _) in made.items()}
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return get_command(app).params


def read_config(file: Path) -> dict[str, Any]:
    """A YAML file of options. Raises: UserError if it is not a mapping."""
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file} must be YAML, got: {' '.join(str(error).split())}.") from error
    if not isinstance(found, dict):
        raise UserError(f"--config {file} must hold NAME: VALUE lines, got {type(found).__name__}. Write for example steps: 100")
    return found


def _flat(values: Mapping[Any, Any], parts: Collection[str]) -> Iterator[tuple[str, Any]]:
    """A part's own mapping as PART.NAME, as `asdict` of a config with others has it; one in another, too; without Nones."""
    for key, value in values.items():
        if key in parts and value is None:
            continue
        if key not in parts or not isinstance(value, Mapping):
            yield str(key), value
            continue
        for name, inner in value.items():
            if name in parts and isinstance(inner, Mapping):
                yield from _flat({name: inner}, parts)
            else:
                yield f"{key}.{name}", inner
