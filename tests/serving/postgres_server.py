"""A PostgreSQL server of the test's own, in a folder, without a network port; none where Debian's package is not installed."""

import os
import shlex
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest


def binaries():
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return places[-1].parent if places else None


@contextmanager
def postgres(folder):
    """URL of an empty database, and functions that start and stop it; as user `postgres` where the tests run as root."""
    place = binaries()
    if place is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql), so the log is tested on SQLite only")
    who = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    data = folder / "data"
    if who:
        shutil.chown(folder, "postgres", "postgres")
        for parent in folder.parents:  # pytest's folders are closed to other users
            if parent.owner() == "root" and parent != Path("/") and not parent.stat().st_mode & 1:
                parent.chmod(parent.stat().st_mode | 0o011)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, "check": True, **who}
    subprocess.run([place / "initdb", "-D", data, "-A", "trust", "-U", "valign", "--no-sync"], **quiet)
    options = f"-c listen_addresses= -c fsync=off -k {shlex.quote(str(folder))}"

    def start():
        """Returns when the server takes connections."""
        subprocess.run([place / "pg_ctl", "start", "-w", "-D", data, "-l", folder / "log", "-o", options], **quiet)

    def stop():
        """As in a crash."""
        subprocess.run([place / "pg_ctl", "stop", "-w", "-m", "immediate", "-D", data], **quiet)

    start()
    try:
        yield f"postgresql://valign@/postgres?host={folder}", start, stop
    finally:
        stop()
