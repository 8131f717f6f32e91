"""What can be refused before any library is imported that takes seconds: misspelt options, and a model that cannot be one.

Options come from dataclasses in modules that import torch. Their fields are read from the source here, not from the module.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import entry_points
from math import inf, isfinite, nan
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

import valign
from valign.checks import UserError, check_choice, check_range, close_to, declared_options
from valign.files import read_json
from valign.models.files.hub import HUB_ID, fetched

ROOT = Path(valign.__file__).parent
FROM_ELSEWHERE = ("--config", "--config-file", "--set")  # flags of every command whose options come from dataclasses
READ = ("--data", "-d", "--config", "--config-file", "--reference")  # flags that name what is read, in every command
KINDS, LIMITS = ("int", "float", "Path", "bool"), ("above", "low", "high")
_KINDS = {"int": int, "float": float, "Path": Path, "bool": bool}
FAMILIES = {"StableDiffusionPipeline": "stable-diffusion", "StableDiffusionXLPipeline": "sdxl"}  # as in `models.diffusion.loading`


class Field(NamedTuple):
    """An option of a dataclass, as far as its source says."""

    flags: tuple[str, ...]
    rare: bool  # given by ``--set`` alone, unless the command types it
    kind: str = ""  # int, float, Path or bool
    limits: Mapping[str, Any] = {}  # above, low, high
    choices: tuple[object, ...] = ()
    none: object = None  # what stands for None

    def check(self, flag: str, value: str) -> None:
        """Refuse what is not a number, out of range, or not one of the choices. Raises: UserError that names the flag."""
        if value == str(self.none):
            return
        try:
            if self.choices:
                check_choice(flag, value, list(map(str, self.choices)))
            elif self.kind in ("int", "float"):
                check_range(flag, _number(flag, value, self.kind), **self.limits)
        except ValueError as error:
            raise UserError(str(error)) from error


def refuse_unknown(
    args: Sequence[str],
    own: Iterable[str],
    parts: Mapping[str, type[Any] | str],
    typed: Mapping[str, tuple[str, ...]],
    *,
    rest: bool,
    rest_from: tuple[str, ...] = (),
) -> None:
    """Refuse an option that nothing has, and a ``--set`` of a name that nothing has.

    Args:
        own: Flags that the command has itself.
        parts, typed: As in `valign.cli.options.configured`.
        rest: Whether ``--set`` takes further names.
        rest_from: Folders of valign whose dataclasses have all of these; empty for names that nobody knows beforehand.
    Raises: UserError that names it and what is spelt most like it.
    """
    fields = {part: fields_of(kind) for part, kind in parts.items()}
    flags = [*own, "--config", "--config-file", "--set", "--help"]
    for part, known in fields.items():
        for name, field in known.items():
            if name in typed.get(part, () if field.rare else (name,)):
                flags += [flag for plain in field.flags for flag in (plain, f"--{part}-{plain.removeprefix('--')}")]
    names = [name for known in fields.values() for name in known]
    for place, word in enumerate(args):
        if word == "--":
            return
        flag, _, value = word.partition("=")
        if re.fullmatch(r"--[a-z][\w-]*", flag) and flag not in flags:
            raise UserError(f"No such option: {flag}.{close_to(flag, flags)} `--help` lists all.")
        if flag == "--set" and (rest_from or not rest):
            given = (value or next(iter(args[place + 1 :]), "")).partition("=")[0]
            part, _, name = given.rpartition(".")
            if name in (fields.get(part, ()) if part else names) or not name:
                continue
            more = fields_in(rest_from)
            if name not in more and not any(entry_points(group=f"valign.{folder}") for folder in rest_from):  # a package's own
                guess = close_to(name, [*names, *more])
                raise UserError(f"--set must name options of the command, got {given}.{guess} `--help` lists all.")


def typed_fields(
    parts: Mapping[str, type[Any] | str], typed: Mapping[str, tuple[str, ...]], own: Collection[str]
) -> dict[str, Field]:
    """The options of the parts by the flags that they have on the command line.

    Args:
        parts, typed: As in `valign.cli.options.configured`.
        own: Flags that the command has itself.
    """
    known: dict[str, Field] = {}
    for part, kind in parts.items():
        for name, field in fields_of(kind).items():
            if name in typed.get(part, () if field.rare else (name,)):
                for plain in field.flags:  # a later part of the same name has --PART-NAME
                    flag = f"--{part}-{plain.removeprefix('--')}" if plain in (*own, *known) else plain
                    if flag not in own:
                        known[flag] = field
    return known


def given_values(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Flags of a command line with what follows them; for a flag that takes no value, that is the next word."""
    for place, word in enumerate(args):
        if word == "--":
            return
        flag, separator, value = word.partition("=")
        if re.fullmatch(r"-[a-z]|--[a-z][\w-]*", flag):
            yield flag, value if separator else next(iter(args[place + 1 :]), "")


def own_words(args: Sequence[str], known: Mapping[str, Field]) -> list[str]:
    """The words of a command line without those options of `typed_fields`, the file's and ``--set``, and their values."""
    found: list[str] = []
    skipped = False
    for place, word in enumerate(args):
        if word == "--":
            return [*found, *args[place:]]
        flag, separator, _ = word.partition("=")
        if not skipped and (flag in known or flag in FROM_ELSEWHERE):
            skipped = not separator and (flag not in known or known[flag].kind != "bool")
        elif skipped:
            skipped = False
        else:
            found.append(word)
    return found


def refuse_out_of_range(args: Sequence[str], known: Mapping[str, Field]) -> None:
    """Refuse the value of a typed option that its own declaration refuses. Args: known: As `typed_fields` has them."""
    for flag, value in given_values(args):
        if value and flag in known:
            known[flag].check(flag, value)


def refuse_settings(args: Sequence[str], parts: Iterable[Mapping[str, Field]]) -> None:
    """Refuse the value of a ``--set`` that every declaration of its name refuses; lists, mappings and null are left to the parts.

    Args: parts: The options that the command has, by part, and those of what was chosen by name.
    """
    for flag, word in given_values(args):
        given, _, value = word.partition("=")
        declared = [part[name] for part in parts if (name := given.rpartition(".")[2]) in part]
        if flag != "--set" or not declared or not re.fullmatch(r"[\w.+-]+", value) or value in ("null", "Null", "NULL"):
            continue
        refused = [error for one in declared if (error := _refusal(one, f"--set {given}", value))]
        if len(refused) == len(declared):
            raise refused[0]


def chosen_rows(args: Sequence[str], named: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """``"module:Class"`` of the rows of valign's own tables that were chosen by name. Args: named: As in `configured`."""
    for flag, value in given_values(args):
        tables = [place for place in named.get(flag, ()) if ":" in place]
        for table, name in ((table, name) for table in tables for name in value.split("+") if name in table_names(table)):
            with suppress(LookupError, ValueError):  # of a package, whose source is not read, or not a class
                yield table_row(table, name)


def refuse_missing(args: Sequence[str], *, any_model: bool, models: Collection[str] = (), texts: Collection[str] = ()) -> None:
    """Refuse the name of a model that cannot be one, and files to read that do not exist; a world's name may stand for its own.

    Args:
        any_model: Whether models of other kinds are taken, too.
        models: Names that stand for a model in this command.
        texts: Flags that take a text in this command, whatever they are elsewhere.
    """
    for flag, value in given_values(args):
        if flag in texts or not value:
            continue
        if flag in ("--model", "-m"):
            refuse_model(value, any_model=any_model, models=models)
        elif flag in READ and value not in bundled() and not Path(value).expanduser().exists():
            raise UserError(f"{flag} {value} does not exist. Check the path.")


def refuse_model(name: str, *, any_model: bool = False, models: Collection[str] = ()) -> None:
    """Refuse a name that is neither a folder of a supported family, nor a bundled model, nor a hub id.

    Raises: UserError as loading it would.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        known = [*bundled(), *models]
        if any_model or name in known:
            return
        if not HUB_ID.fullmatch(name):
            raise UserError(
                f"{name} does not exist. Give a diffusers folder, {''.join(f'{one}, ' for one in models)}or a hub id such as "
                f"owner/name.{close_to(name, known)}"
            )
        folder = fetched(name, "model_index.json").parent
    index = folder / "model_index.json"
    if index.is_file():
        found = read_json(index)
        kind = found.get("_class_name") if isinstance(found, dict) else None
        if kind not in FAMILIES:
            raise UserError(
                f"{folder} must be one of {', '.join(FAMILIES)}; got {kind}. Choose a model of a supported architecture."
            )


def bundled() -> list[str]:
    """Names of the worlds, whose models come with the package."""
    return sorted(path.parent.name for path in (ROOT / "worlds").glob("*/world.py"))


def fields_of(part: type[Any] | str) -> dict[str, Field]:
    """The options of a dataclass, or of ``"module:Class"``, which is not imported."""
    if isinstance(part, str):
        return _read_fields(part)
    return {
        name: Field(
            one.flags or _flags(name),
            one.rare,
            next((word for word in KINDS if _KINDS[word] in _kinds(one.type)), ""),
            {word: getattr(one, word) for word in LIMITS if getattr(one, word) not in (None, inf, -inf)},
            tuple(one.choices) if get_origin(one.type) is not tuple else (),
            one.none,
        )
        for name, one in declared_options(part).items()
    }


@cache
def _read_fields(place: str) -> dict[str, Field]:
    module, _, name = place.partition(":")
    tree = ast.parse(source(module).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            inherited: dict[str, Field] = {}
            for base in (one.id for one in node.bases if isinstance(one, ast.Name)):
                with suppress(LookupError):  # of another library
                    inherited |= _read_fields(f"{module}:{base}")
            return inherited | dict(_fields(node, module))
        if (origin := _imported_from(node, name)) is not None:
            return _read_fields(origin)
    raise LookupError(f"{place} is not in its source")


def _imported_from(node: ast.stmt, name: str) -> str | None:
    """``"module:Name"`` of what a statement imports from valign under this name; None if it does not."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("valign"):
        return next((f"{node.module}:{one.name}" for one in node.names if name == (one.asname or one.name)), None)
    return None


@cache
def table_names(place: str) -> list[str]:
    """The names in a literal table ``"module:TABLE"``, which is not imported, and those that packages add."""
    module, _, name = place.partition(":")
    for node in ast.parse(source(module).read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(one, ast.Name) and one.id == name for one in targets):
            return list(_names(node.value))  # type: ignore[attr-defined]
        if (origin := _imported_from(node, name)) is not None:
            return table_names(origin)
    raise LookupError(f"{place} is not in its source")


@cache
def table_row(place: str, row: str) -> str:
    """``"module:Class"`` of a row of a literal table ``"module:TABLE"`` of classes, or of a package's own row."""
    module, _, name = place.partition(":")
    body = ast.parse(source(module).read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(one, ast.Name) and one.id == name for one in targets):
                for table in (one for one in ast.walk(node.value) if isinstance(one, ast.Dict)):
                    for key, value in zip(table.keys, table.values, strict=True):
                        if isinstance(value, ast.Name) and key is not None and ast.literal_eval(key) == row:
                            imported = (_imported_from(one, value.id) for one in body)
                            return next((one for one in imported if one), f"{module}:{value.id}")
    raise LookupError(f"{place} has no row {row} in its source")


def known_names(places: Iterable[str]) -> list[str]:
    """Names, and those in tables that are given as ``"module:TABLE"``."""
    return [name for one in places for name in (table_names(one) if ":" in one else (one,))]


def _names(value: ast.expr) -> Iterator[str]:
    if isinstance(value, ast.Call) and len(value.args) == 2:  # with_plugins(group, table)
        group, value = ast.literal_eval(value.args[0]), value.args[1]
        yield from _names(value)
        yield from sorted(point.name for point in entry_points(group=group))
    elif isinstance(value, ast.Dict):
        yield from (ast.literal_eval(key) for key in value.keys if key is not None)
    else:
        yield from ast.literal_eval(value)


@cache
def fields_in(folders: tuple[str, ...]) -> list[str]:
    """Names of the fields of all classes in these folders of valign."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for folder in folders for path in sorted((ROOT / folder).glob("*.py")))
    classes = (node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    fields = (ast.unparse(line.target) for node in classes for line in node.body if isinstance(line, ast.AnnAssign))
    return list(dict.fromkeys(fields))


def source(module: str) -> Path:
    """The file of a module of valign."""
    path = ROOT.parent.joinpath(*module.split("."))
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"


def _fields(node: ast.ClassDef, module: str) -> Iterator[tuple[str, Field]]:
    """What is declared by `option`."""
    for line in node.body:
        call = line.value if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "option":
            name, told = ast.unparse(line.target), {word.arg: word.value for word in call.keywords}  # type: ignore[attr-defined]
            flags = ast.literal_eval(told["flags"]) if "flags" in told else _flags(name)
            told_type = _spelled_out(ast.unparse(line.annotation), module)  # type: ignore[attr-defined]
            words = re.findall(r"\w+", told_type)
            kind = next((word for word in KINDS if word in words and not {"dict", "Mapping"} & set(words)), "")
            limits = {word: _literal(told[word], None) for word in LIMITS if word in told}
            literal = re.search(r"Literal(\[.*?\])", told_type)
            choices = ast.literal_eval(literal[1]) if literal else _choices(told.get("choices"), module)
            yield (
                name,
                Field(
                    flags,
                    "rare" in told,
                    kind,
                    {word: value for word, value in limits.items() if value is not None},
                    tuple(choices) if "tuple" not in words else (),
                    _literal(told.get("none"), None),
                ),
            )


@cache
def _literals(module: str) -> Mapping[str, str]:
    """Names of a module, its own and imported from valign, that stand for a ``Literal[...]``, with it."""
    found: dict[str, str] = {}
    for node in ast.parse(source(module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Subscript):
            if ast.unparse(node.value.value) == "Literal":
                found[node.targets[0].id] = ast.unparse(node.value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("valign"):
            for one in node.names:
                file = source(str(node.module))
                if file.is_file() and f"\n{one.name} = Literal[" in file.read_text(encoding="utf-8"):
                    found[one.asname or one.name] = _literals(str(node.module))[one.name]
    return found


def _spelled_out(told: str, module: str) -> str:
    """An annotation with ``Literal[...]`` in the place of a name that stands for one."""
    return re.sub(r"\b[A-Z]\w*\b(?!\[)", lambda match: _literals(module).get(match[0], match[0]), told)


def _choices(node: ast.expr | None, module: str) -> Iterable[object]:
    """Choices that are written out, or that a table of the module has: ``TABLE``, or ``tuple(TABLE)``."""
    inner = node.args[0] if isinstance(node, ast.Call) and len(node.args) == 1 else node
    if isinstance(inner, ast.Name):
        try:
            return table_names(f"{module}:{inner.id}")
        except (LookupError, ValueError):
            return ()
    return _literal(node, ())  # type: ignore[no-any-return]


def _kinds(declared: Any) -> tuple[Any, ...]:
    """What a value of the type may be; of a tuple one item's, of a mapping nothing."""
    return get_args(declared) if get_origin(declared) in (tuple, Union, UnionType) else (declared,)


def _literal(node: ast.expr | None, otherwise: Any) -> Any:
    """The value of an expression that is written out; otherwise what is known only by running it."""
    try:
        return otherwise if node is None else ast.literal_eval(node)
    except ValueError:
        return otherwise


def _refusal(field: Field, flag: str, value: str) -> UserError | None:
    try:
        field.check(flag, value)
    except UserError as error:
        return error
    return None


def _number(flag: str, value: str, kind: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = nan
    if not isfinite(number) or (kind == "int" and number != int(number)):
        raise UserError(f"{flag} must be a {'whole ' if kind == 'int' else ''}number, got {value!r}.")
    return int(number) if kind == "int" else number


def _flags(name: str) -> tuple[str, ...]:
    plain = name.replace("_", "-")
    return (f"--{plain}", f"--no-{plain}")
