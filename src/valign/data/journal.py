"""A file to which every finished piece of a long step is added at once, so that a kill loses nothing before it."""

import json
import os
from pathlib import Path
from typing import Any

from valign.checks import UserError


class Journal:
    """JSON objects, one a line, each with a ``key``. Opening reads what is there; a last line torn by a kill is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}  # by key, in the order of the file
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self.entries[entry["key"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{number} is not a journal entry. Delete that line and run the step again.") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(whole) < len(data):
            os.truncate(path, len(whole))

    def add(self, *entries: dict[str, Any]) -> None:
        """Append entries and wait until the disk has them. Raises: UserError if the disk is full."""
        try:
            with self.path.open("ab") as file:
                file.writelines(json.dumps(entry, ensure_ascii=False).encode() + b"\n" for entry in entries)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path} could not be written: {error.strerror}. Free some space and run the step again."
            ) from error
        self.entries.update((entry["key"], entry) for entry in entries)
