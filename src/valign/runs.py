"""The `run.json` of every folder that a step makes: recipe, seed, versions and hashes of what went in.

A finished step whose recipe and inputs are unchanged is skipped; an interrupted one resumes; a folder made
from something else is never overwritten unasked.
"""

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from valign.checks import UserError
from valign.files import hash_value, read_json, write_json

ABSENT = "\0absent"  # stands for a name that a record lacks
HASH = re.compile(r"[0-9a-f]{64}")
LONGEST = 80  # characters of a value in a message
PACKAGES = ("valign", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass
class Run:
    """One step's folder. ``done`` says that it is finished and need not run again; ``results`` is what it then recorded."""

    folder: Path
    record: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    done: bool = False

    @classmethod
    def open(cls, folder: Path, *, step: str, recipe: dict[str, Any], inputs: dict[str, str], seed: int = 0) -> "Run":
        """Start, resume or recognize the step in ``folder``.

        Args:
            step: The step's name, e.g. ``"prompts"``.
            recipe: Every option that shapes the result; JSON-able.
            inputs: Name -> SHA-256 of each input (`hash_file`, `hash_value`, `DiffusionModel.fingerprint`).
        Raises: UserError if the folder holds a run of another step, recipe or input (the message names what differs).
        """
        key = {"step": step, "recipe": recipe, "inputs": inputs, "seed": seed}
        path = folder / "run.json"
        if path.exists():
            record = read_json(path)
            if record.get("key") == hash_value(key):
                return cls(folder, record, record.get("results", {}), record.get("status") == "done")
            raise UserError(_differs(folder, record, key))
        record = {"key": hash_value(key), **key, "versions": versions(), "status": "running", "started": _now()}
        write_json(path, record)
        return cls(folder, record)

    def give_up(self) -> None:
        """Take back a record beside which nothing was written: it would refuse the next try, with the mistake mended."""
        if not self.done and [path.name for path in self.folder.iterdir()] == ["run.json"]:
            (self.folder / "run.json").unlink()
            self.folder.rmdir()

    def finish(self, **results: Any) -> None:
        """Record JSON-able ``results`` and mark the step as done."""
        self.results, self.done = results, True
        write_json(self.folder / "run.json", {**self.record, "status": "done", "finished": _now(), "results": results})


def _differs(folder: Path, record: Mapping[str, Any], key: Mapping[str, Any]) -> str:
    """What was otherwise when ``folder`` was made: every option and input by name, with both values."""
    changed = [name for name in key if hash_value(record.get(name)) != hash_value(key[name])]
    then, now = (_flat({name: each.get(name) for name in changed}) for each in (record, key))
    told = [
        f"{name.partition('.')[2] or name} was {_shown(then.get(name, ABSENT))} and is now {_shown(now.get(name, ABSENT))}"
        for name in dict.fromkeys([*then, *now])
        if hash_value(then.get(name, ABSENT)) != hash_value(now.get(name, ABSENT))
    ]
    return (
        f"{folder} was made with another {' and '.join(changed)}: {'; '.join(told)}. Give the earlier values to go on with it, "
        "choose another output folder, or delete this one to make it again."
    )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of nested mappings by its dotted name."""
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    return found


def _shown(value: Any) -> str:
    """A value on one line; of a hash the first characters."""
    if value is ABSENT:
        return "not there"
    if isinstance(value, str) and HASH.fullmatch(value):
        return value[:12]
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
