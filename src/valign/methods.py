"""What a method (a paper's contribution) says of itself, next to its code, as a module constant `METHOD`."""

import pkgutil
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of `valign methods` and of the documentation's table."""

    slug: str
    title: str
    paper: str  # "arXiv 2412.10493", or "-" for a common technique
    room: str
    entry: str  # "package.module:name", importable
    fidelity: Literal["", "exact", "simplified", "variant"] = ""  # against its source, as its test shows; empty: not said
    note: str = ""  # why


def declared_methods() -> list[Method]:
    """Every `METHOD` of the package, by room and slug. Imports all modules."""
    found: list[Method] = []
    package = find_spec("valign")
    assert package is not None
    for info in pkgutil.walk_packages(package.submodule_search_locations, prefix="valign."):
        if info.name.startswith(("valign.cli", "valign.__main__")):
            continue
        method = getattr(import_module(info.name), "METHOD", None)
        if isinstance(method, Method):
            found.append(method)
    return sorted(found, key=lambda method: (method.room, method.slug))
