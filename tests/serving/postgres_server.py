"""A PostgreSQL server of the test's own, in a folder, without a network port; none where Debian's package is not installed."""

import os
import shutil
import subprocess
import time
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
    """URL of an empty database, and the process. The server runs as user `postgres` where the tests run as root."""
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
    server = None

    def start():
        nonlocal server
        with (folder / "log").open("ab") as log:
            options = ["-c", "listen_addresses=", "-c", "fsync=off", "-k", str(folder)]
            server = subprocess.Popen([place / "postgres", "-D", data, *options], stdout=log, stderr=log, cwd=folder, **who)
        ready = [place / "pg_isready", "-q", "-h", str(folder), "-U", "valign"]
        for _ in range(200):
            if subprocess.run(ready, check=False).returncode == 0:
                return
            time.sleep(0.05)
        raise RuntimeError((folder / "log").read_text())

    def stop():
        server.send_signal(3)  # immediate shutdown, as in a crash
        server.wait(10)

    start()
    try:
        yield f"postgresql://valign@/postgres?host={folder}", start, stop
    finally:
        stop()
