"""The files of a log in SQLite: private ones, and older ones that were set aside full.

``log.db`` is written; ``log.db.1``, ``log.db.2``, ... are older, the first the oldest. Each file begins with the last entry of the
one before it, so the chain of hashes goes on over all of them.
"""

import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path

from valign.checks import UserError

PRIVATE = 0o600  # who may read and write the log: its owner alone
COPY = "INSERT INTO new.valign_audit SELECT * FROM main.valign_audit ORDER BY seq DESC LIMIT 1"


def make_private(file: Path) -> None:
    """Create the file if it is missing; nobody but its owner may read or write it from now on."""
    os.close(os.open(file, os.O_CREAT | os.O_RDWR, PRIVATE))
    if os.name == "posix" and file.stat().st_mode & 0o777 != PRIVATE:
        file.chmod(PRIVATE)


def older_files(file: Path) -> list[Path]:
    """The files set aside before this one, the oldest first. Raises: UserError if one of their numbers is missing."""
    named = re.compile(rf"{re.escape(file.name)}\.(\d+)")
    found = {int(match[1]): one for one in file.parent.glob(f"{file.name}.*") if (match := named.fullmatch(one.name))}
    if found and file.exists() and found[max(found)].samefile(file):  # a rotation that was cut short
        del found[max(found)]
    if missing := sorted(set(range(1, max(found, default=0) + 1)) - set(found)):
        raise UserError(f"The audit log's file {file}.{missing[0]} is gone, and later ones are there. Bring it back.")
    return [found[number] for number in sorted(found)]


def file_size(file: Path) -> int:
    """Bytes of the file and of what SQLite has not put into it yet."""
    return sum(part.stat().st_size for part in (file, Path(f"{file}-wal")) if part.exists())


def rotate(file: Path, fresh: Path) -> bool:
    """Set the file aside and put ``fresh`` in its place, with the last entry copied into it. No connection may hold it open.

    Args: fresh: A new file with an empty log.
    Returns: False where another process holds the file open; then nothing was changed.
    """
    aside = Path(f"{file}.{len(older_files(file)) + 1}")
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        try:
            if connection.execute("PRAGMA journal_mode = DELETE").fetchone()[0] != "delete":
                return False
            connection.execute("ATTACH DATABASE ? AS new", (str(fresh),))
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:
            return False
        connection.execute(COPY)
        connection.execute("COMMIT")
    aside.unlink(missing_ok=True)  # of a rotation that was cut short: another name of the same file
    os.link(file, aside)
    os.replace(fresh, file)
    return True
