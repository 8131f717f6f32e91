"""What does the service itself cost per request, with stages that answer at once?

    python benchmarks/serving.py [--clients 32] [--rate 300] [--seconds 5] [--rounds 5]
    python benchmarks/serving.py --minutes 10        # long load; shows errors and growth of memory

A real uvicorn process with key check, queues, SQLite audit log and metrics, but a guard that passes everything and a model that
returns a ready image. 32 clients with a connection each, in this process. Two kinds of load: *paced*, where the clients share a
rate (what a service sees; the time is the framework's overhead), and *saturated*, where each asks again at once (what a service can
do at most; the time is mostly waiting for the other clients). "bare" is a FastAPI route in a server of its own that checks the same
body and returns the same answer, and does nothing else. CPU is the server's, per request: it hardly depends on what else the
machine does. The log entry of an image is synced to disk before the image is handed out; what one sync costs stands above.

Rows of a round follow one another, and what is printed of each is the median over the rounds, with the range of p99: a neighbour on
the same host can take the processor away for seconds, which "stolen" shows where the kernel is told of it.
"""

import argparse
import asyncio
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import numpy as np

KEY = "benchmark-key-of-no-value"
Request = tuple[str, Mapping[str, object]]
CHECK: Request = ("/v1/moderations", {"input": "a red apple on a wooden table"})
DRAW: Request = ("/v1/images/generations", {"prompt": "a red apple on a wooden table", "seed": 1})


def serve_bare(port: int) -> None:
    """The alternative: no key, guard, log or metrics."""
    import uvicorn
    from fastapi import FastAPI

    from valign.serving.categories import merge
    from valign.serving.schemas import ModerationAnswer, ModerationRequest

    app = FastAPI()

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {}

    @app.post(CHECK[0])
    async def moderation(body: ModerationRequest) -> ModerationAnswer:
        return ModerationAnswer(id="modr-0", model="bare", results=[merge([])], guard=[{}])

    uvicorn.run(app, port=port, log_level="error", access_log=False)


def serve_full(folder: Path, port: int) -> None:
    """The server process."""
    from PIL import Image

    from valign.guard import Guard, Verdict
    from valign.policy import load_policy
    from valign.serving.app import create_app
    from valign.serving.audit_store import AuditStore
    from valign.serving.keys import Keys
    from valign.serving.server import serve
    from valign.serving.service import Rules, Service
    from valign.serving.settings import Settings

    image = Image.new("RGB", (64, 64), "red")

    class Pass:
        name, level = "pass", "word"

        def check(self, prompt: str) -> Verdict:
            return Verdict(stage=self.name, level="word")

        def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
            return [self.check(prompt) for prompt in prompts]

    class Ready:
        def generate(self, prompts: Sequence[str], **options: object) -> list[Image.Image]:
            return [image] * len(prompts)

        def fingerprint(self) -> str:
            return ""

    rules = Rules(Guard(load_policy("default"), [Pass()]), Keys.load(environment=KEY))
    settings = Settings(names=("ready",), batch_wait=0.0)
    store = AuditStore(str(folder / "audit.db"), create=True)
    serve(create_app(Service(Ready, lambda: rules, store, secret=b"benchmark", settings=settings)), port=port)


async def client(port: int, request: Request, until: float, pause: float, first: float) -> tuple[list[float], int]:
    """Milliseconds of every answered request, and how many failed."""
    path, body = request
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    times, errors, due = [], 0, time.perf_counter() + first
    while time.perf_counter() < until:
        if pause:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            due = max(due + pause, time.perf_counter())
        start = time.perf_counter()
        writer.write(head.encode() + data)
        status = await reader.readline()
        length = 0
        while (line := await reader.readline()) not in (b"\r\n", b""):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        await reader.readexactly(length)
        times.append((time.perf_counter() - start) * 1000)
        errors += b" 200 " not in status
    writer.close()
    return times, errors


async def load(port: int, request: Request, clients: int, seconds: float, rate: float) -> tuple[list[float], int]:
    until, pause = time.perf_counter() + seconds, clients / rate if rate else 0.0
    work = [client(port, request, until, pause, pause * number / clients) for number in range(clients)]
    found = await asyncio.gather(*work)
    return [ms for times, _ in found for ms in times], sum(errors for _, errors in found)


def resident(pid: int) -> float:
    """MiB of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def cpu(pid: int) -> float:
    """Seconds that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def processors() -> tuple[float, float]:
    """Ticks of all processors: stolen by the host, and altogether."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return fields[7], sum(fields)


def sync_cost(folder: Path) -> float:
    """Milliseconds of a small write that reaches the disk, median of 50."""
    times = []
    with (folder / "sync").open("wb") as file:
        for _ in range(50):
            start = time.perf_counter()
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
            times.append((time.perf_counter() - start) * 1000)
    return float(np.median(times))


@contextmanager
def server(kind: str) -> Iterator[tuple[int, int]]:
    """Port and process of a server that is ready and warm."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.TemporaryDirectory()  # ours: a server that was told to stop does not clean up
    process = subprocess.Popen([sys.executable, __file__, f"--{kind}", str(port), "--folder", folder.name])
    try:
        while process.poll() is None:
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/readyz") as answer:
                if answer.status == 200:
                    break
            time.sleep(0.2)
        asyncio.run(load(port, CHECK, 32, 1.0, 0))
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(30)
        folder.cleanup()


class Row(NamedTuple):
    """One kind of load, once. Times in milliseconds."""

    p50: float
    p95: float
    p99: float
    rate: float  # answered requests per second
    cpu: float  # of the server, per request
    stolen: float  # percent of the processors' time that the host gave to others
    errors: int


def measure(place: tuple[int, int], request: Request, clients: int, seconds: float, rate: float) -> Row:
    port, pid = place
    before, at_first = cpu(pid), processors()
    times, errors = asyncio.run(load(port, request, clients, seconds, rate))
    each, (stolen, passed) = (cpu(pid) - before) / len(times) * 1000, np.subtract(processors(), at_first)
    p50, p95, p99 = np.percentile(times, [50, 95, 99])
    return Row(p50, p95, p99, len(times) / seconds, each, 100 * stolen / max(passed, 1), errors)


def show(name: str, rows: Sequence[Row]) -> None:
    """The median of the rounds; errors of all of them."""
    p50, p95, p99, rate, each, stolen, _ = np.median(rows, axis=0)
    worst = [row.p99 for row in rows]
    print(
        f"{name:26}{p50:8.2f}{p95:8.2f}{p99:8.2f}{f'{min(worst):.1f} to {max(worst):.1f}':>16}{rate:11.0f}{each:8.2f}{stolen:8.1f}"
        f"{sum(row.errors for row in rows):8d}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rate", type=float, default=300.0, help="requests per second of all clients in paced load")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=int, default=0, help="long paced load instead, moderation and images in turn")
    parser.add_argument("--full", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        serve_bare(options.bare)
        return
    if options.full:
        serve_full(options.folder, options.full)
        return
    with tempfile.TemporaryDirectory() as name:
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}",
            end="",
        )
        print(f", {options.clients} clients, one sync to disk {sync_cost(Path(name)):.1f} ms")
    print(f"{'':26}{'p50 ms':>8}{'p95':>8}{'p99':>8}{'p99 of rounds':>16}{'requests/s':>11}{'CPU ms':>8}{'stolen':>8}{'errors':>8}")
    with server("full") as full:
        if options.minutes:
            long_load(full, options)
            return
        with server("bare") as bare:
            compare(full, bare, options)


def long_load(place: tuple[int, int], options: argparse.Namespace) -> None:
    start, before = time.perf_counter(), resident(place[1])
    for minute in range(options.minutes):
        row = measure(place, DRAW if minute % 2 else CHECK, options.clients, 60.0, options.rate)
        show(f"minute {minute + 1}, {resident(place[1]):.0f} MiB", [row])
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes: memory {before:.0f} -> {resident(place[1]):.0f} MiB")


def compare(full: tuple[int, int], bare: tuple[int, int], options: argparse.Namespace) -> None:
    kinds = [
        (f"{what}, {f'paced {rate:g}/s' if rate else 'saturated'}", place, request, rate)
        for what, place, request in (("moderation", full, CHECK), ("picture", full, DRAW), ("bare", bare, CHECK))
        for rate in (options.rate, 0.0)
    ]
    rounds = [
        [measure(place, request, options.clients, options.seconds, rate) for _, place, request, rate in kinds]
        for _ in range(options.rounds)
    ]
    for (name, *_), rows in zip(kinds, zip(*rounds, strict=True), strict=True):
        show(name, rows)


if __name__ == "__main__":
    main()
