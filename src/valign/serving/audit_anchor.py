"""Where the log ends, kept outside the database: number and hash of its last entry, in a file of one line.

A chain of hashes does not show that its end is missing; this file does. It is written behind every transaction, so it is never
ahead of the log. With a secret it is signed, and a file that somebody else wrote is refused.
"""

import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path

from valign.checks import UserError
from valign.serving.audit_files import make_private

LINE = re.compile(r"(\d{20}) ([0-9a-f]{64}) ([0-9a-f]{64})\n")
UNSIGNED = "0" * 64


@dataclass(frozen=True)
class LogHead:
    """The last entry that is known to have been written."""

    seq: int
    hash: str


@dataclass(frozen=True)
class Anchor:
    """The file. Args: secret: Signs it; b"" leaves it unsigned."""

    file: Path
    secret: bytes = b""

    def read(self) -> LogHead | None:
        """None where there is no file. Raises: UserError if it is damaged or was signed by somebody else."""
        if not self.file.exists():
            return None
        match = LINE.fullmatch(self.file.read_text(encoding="ascii", errors="replace"))
        if match is None:
            raise UserError(f"{self.file} must hold a number and two hashes, it is damaged. Was the log tampered with?")
        head = LogHead(int(match[1]), match[2])
        if self.secret and not hmac.compare_digest(match[3], self._signature(head)):
            raise UserError(
                f"{self.file} was not signed with this VALIGN_AUDIT_KEY. Was the log tampered with? Another key needs a new log."
            )
        return head

    def write(self, head: LogHead) -> None:
        """Keep the head unless the file knows a later one, of another server on the same log."""
        known = self.read()
        if known is not None and known.seq >= head.seq:
            return
        line = f"{head.seq:020d} {head.hash} {self._signature(head) if self.secret else UNSIGNED}\n"
        if known is None:
            make_private(self.file)
        with open(self.file, "r+b") as file:  # always of one length: written over in place
            file.write(line.encode())

    def _signature(self, head: LogHead) -> str:
        return hmac.new(self.secret, f"{head.seq} {head.hash}".encode(), hashlib.sha256).hexdigest()
