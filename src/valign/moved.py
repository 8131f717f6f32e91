"""Import paths of the first preview that lead to where a module is now. Each gives a `DeprecationWarning`; all go with version 0.2.

``moved.txt`` holds the table: the old path and the new one, both below ``valign``.
"""

import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

TABLE = Path(__file__).with_name("moved.txt")


def moved_modules() -> dict[str, str]:
    """Every old path with the new one, both with ``valign.`` before them."""
    rows = (line.split() for line in TABLE.read_text(encoding="utf-8").splitlines())
    return {f"valign.{old}": f"valign.{new}" for old, new in rows}


class MovedModules(MetaPathFinder, Loader):
    """Finds a module by its old path and gives the very module that stands at the new one."""

    def __init__(self, table: Mapping[str, str]) -> None:
        self.table = table
        self.specs: dict[str, ModuleSpec | None] = {}  # of the modules as they are, by old path

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in self.table else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = self.table[spec.name]
        warnings.warn(f"{spec.name} is now {new}. The old path goes with version 0.2.", DeprecationWarning, stacklevel=2)
        module = import_module(new)
        self.specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is run again; the import system has put its own spec on the module, and the module gets its own back."""
        assert module.__spec__ is not None
        module.__spec__ = self.specs.pop(module.__spec__.name)


def install() -> None:
    """Let old paths be imported; a second call changes nothing."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules(moved_modules()))
