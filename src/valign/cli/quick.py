"""What can be refused before any library is imported that takes seconds: misspelt options, and a model that cannot be one.

Options come from dataclasses in modules that import torch. Their fields are read from the source here, not from the module.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import valign
from valign.checks import UserError, close_to, declared_options
from valign.files import read_json

ROOT = Path(valign.__file__).parent
READ = ("--data", "-d", "--config", "--config-file", "--reference")  # flags that name what is read, in every command
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
FAMILIES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")  # as `valign.models.diffusion.loading` has them


class Field(NamedTuple):
    """An option of a dataclass."""

    flags: tuple[str, ...]
    rare: bool  # given by ``--set`` alone, unless the command types it


def refuse_unknown(
    args: Sequence[str],
    own: Iterable[str],
    parts: Mapping[str, type[Any] | str],
    typed: Mapping[str, tuple[str, ...]],
    *,
    rest: bool,
) -> None:
    """Refuse an option that nothing has, and a ``--set`` of a name that nothing has.

    Args:
        own: Flags that the command has itself.
        parts, typed: As in `valign.cli.options.configured`.
        rest: Whether ``--set`` takes further names.
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
        if flag == "--set" and not rest:
            given = (value or next(iter(args[place + 1 :]), "")).partition("=")[0]
            part, _, name = given.rpartition(".")
            if name and name not in (fields.get(part, ()) if part else names):
                raise UserError(f"--set must name options of the command, got {given}.{close_to(name, names)} `--help` lists all.")


def refuse_missing(args: Sequence[str], *, any_model: bool, texts: Collection[str] = ()) -> None:
    """Refuse the name of a model that cannot be one, and files to read that do not exist; a world's name may stand for its own.

    Args:
        any_model: Whether models of other kinds are taken, too.
        texts: Flags that take a text in this command, whatever they are elsewhere.
    """
    for place, word in enumerate(args):
        flag, separator, value = word.partition("=")
        value = value if separator else next(iter(args[place + 1 :]), "")
        if flag in ("--model", "-m") and value:
            refuse_model(value, any_model=any_model)
        elif flag in READ and flag not in texts and value and value not in bundled() and not Path(value).expanduser().exists():
            raise UserError(f"{flag} {value} does not exist. Check the path.")


def refuse_model(name: str, *, any_model: bool = False) -> None:
    """Refuse a name that is neither a folder of a supported family, nor a bundled model, nor a hub id.

    Raises: UserError as loading it would.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        if not any_model and name not in bundled() and not HUB_ID.fullmatch(name):
            raise UserError(
                f"{name} does not exist. Give a diffusers folder, or a hub id such as owner/name.{close_to(name, bundled())}"
            )
        return
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
    return {name: Field(one.flags or _flags(name), one.rare) for name, one in declared_options(part).items()}


@cache
def _read_fields(place: str) -> dict[str, Field]:
    module, _, name = place.partition(":")
    tree = ast.parse(_source(module).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return dict(_fields(node))
        if isinstance(node, ast.ImportFrom) and node.module and any(name == (one.asname or one.name) for one in node.names):
            return _read_fields(f"{node.module}:{name}")
    raise LookupError(f"{place} is not in its source")


def _source(module: str) -> Path:
    path = ROOT.parent.joinpath(*module.split("."))
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, Field]]:
    """What is declared by `option`."""
    for line in node.body:
        call = line.value if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "option":
            name, told = ast.unparse(line.target), {word.arg: word.value for word in call.keywords}  # type: ignore[attr-defined]
            flags = ast.literal_eval(told["flags"]) if "flags" in told else _flags(name)
            yield name, Field(flags, "rare" in told)


def _flags(name: str) -> tuple[str, ...]:
    plain = name.replace("_", "-")
    return (f"--{plain}", f"--no-{plain}")
