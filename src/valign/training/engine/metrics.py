"""`metrics.jsonl`: one line a step, appended whole; cut back to the checkpoint when a run resumes."""

import json
import os
from pathlib import Path

from valign.files import write_text


class MetricsLog:
    """Append-only; a kill leaves at most one broken last line, which the next `rewind` drops."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, float | int | str]) -> None:
        """Write one line in one system call."""
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, (json.dumps(record) + "\n").encode())
        finally:
            os.close(file)

    def read(self) -> list[dict[str, float | int | str]]:
        """All whole lines, in order; none if the file is missing."""
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                records.append(json.loads(line))
            except ValueError:  # a line that a kill cut short
                continue
        return records

    def rewind(self, step: int) -> None:
        """Forget every step after ``step``."""
        kept = [record for record in self.read() if int(record["step"]) <= step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
