"""What a method (a paper's contribution) says of itself, next to its code, as a module constant `METHOD`."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

START = "\nMETHOD = Method("


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of `valign methods` and of the documentation's table."""

    slug: str
    title: str
    paper: str  # "arXiv 2412.10493", or "-" for a common technique
    room: str
    entry: str  # "package.module:name", importable
    fidelity: Literal["exact", "simplified", "variant"]  # against its source, as its test shows
    note: str  # why


def declared_methods() -> list[Method]:
    """Every `METHOD` of the package, by room and slug; read from the sources, so that no module is imported.

    Raises: ValueError for a declaration that is not written in plain values.
    """
    package = find_spec("valign")
    assert package is not None
    assert package.submodule_search_locations is not None
    files = (file for place in package.submodule_search_locations for file in sorted(Path(place).rglob("*.py")))
    found = [method for file in files for method in _declared(file)]
    return sorted(found, key=lambda method: (method.room, method.slug))


def _declared(file: Path) -> Iterator[Method]:
    text = file.read_text(encoding="utf-8")
    for node in ast.parse(text).body if START in text else ():
        call = node.value if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METHOD" else None
        if isinstance(call, ast.Call):
            yield Method(**{str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords})
