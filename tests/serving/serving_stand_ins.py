"""A server in a thread, with a model and a guard that do as they are told."""

import json
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import uvicorn
from PIL import Image

from valign.detectors import DetectorCard
from valign.guard import Guard, Verdict
from valign.policy import load_policy
from valign.serving.app import create_app
from valign.serving.audit_store import AuditStore
from valign.serving.keys import Keys
from valign.serving.service import Rules, Service
from valign.serving.settings import Settings

SIDE = 32


class Model:
    """Images of one colour, which tells the seed; ``calls`` holds what each call was asked.

    After the warm-up every call sets ``called`` and waits for ``wait`` if there is one.
    """

    def __init__(self, wait=None):
        self.wait, self.calls, self.fails, self.called = wait, [], False, threading.Event()

    def generate(self, prompts, *, seeds=None, sampling):
        seeds = sampling.seeds(len(prompts)) if seeds is None else seeds
        self.calls.append((list(prompts), list(seeds), sampling.steps))
        if self.wait is not None and len(self.calls) > 1:  # not the warm-up
            self.called.set()
            self.wait.wait(10)
        if self.fails:
            raise RuntimeError("out of memory")
        return [Image.new("RGB", (SIDE, SIDE), (seed % 255 + 1, 10, 10)) for seed in seeds]

    def fingerprint(self):
        return "0" * 64


class Stage:
    """Passes, unless told to fire, fail or wait."""

    name, level = "told", "word"

    def __init__(self, *, fails=False, wait=None):
        self.fails, self.wait, self.batches = fails, wait, []

    def check(self, prompt):
        return self.check_many([prompt])[0]

    def check_many(self, prompts):
        self.batches.append(len(prompts))
        if self.wait is not None:
            self.wait.wait(10)
        if self.fails:
            raise ConnectionError("the endpoint is gone")
        return [Verdict(stage=self.name, level="word") for _ in prompts]


class Watcher:
    """A detector that flags images of the seeds it is given, by their colour."""

    def __init__(self, flags=(), fails=False):
        self.card = DetectorCard(name="watcher", classes=("violence", "brand"), threshold=0.5, weights_sha256="0" * 64)
        self.flags, self.fails = set(flags), fails

    def detect(self, images):
        if self.fails:
            raise RuntimeError("no detector today")
        return np.array([[0.9 if image.getpixel((0, 0))[0] - 1 in self.flags else 0.1, 0.0] for image in images])


@cache
def default_policy():
    return load_policy("default")


def quick_policy(**changes):
    policy = default_policy()
    return policy.model_copy(update={"guard": policy.guard.model_copy(update={"stages": ["lexical", "values"], **changes})})


@dataclass
class Reply:
    status: int
    headers: object
    content: bytes

    def json(self):
        return json.loads(self.content)


def ask(url, data=None, *, key="", headers=()):
    """GET, or POST of JSON or of bytes; an error status is a reply like any other."""
    body = data if data is None or isinstance(data, bytes) else json.dumps(data).encode()
    marked = {"content-type": "application/json", **dict(headers)} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, marked), timeout=60) as answer:
            return Reply(answer.status, answer.headers, answer.read())
    except urllib.error.HTTPError as error:
        return Reply(error.code, error.headers, error.read())


def until(condition, seconds=10.0):
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.01)
    assert condition()


def make_service(folder, *, model=None, guard=None, keys=None, settings=None, load_rules=None, load=None, **options):
    model = model or Model()
    guard = guard or Guard.from_policy(quick_policy())
    return Service(
        load or (lambda: model),
        load_rules or (lambda: Rules(guard, keys or Keys())),
        AuditStore(str(folder / "audit.db"), create=True),
        secret=b"secret",
        settings=settings or Settings(names=("tiny",), batch_wait=0.0, steps=4),
        **options,
    )


class Server(uvicorn.Server):
    """Says when it listens, and calls ``on_stop`` when it begins to shut down."""

    def __init__(self, config, on_stop):
        super().__init__(config)
        self.listening, self.on_stop = threading.Event(), on_stop

    async def startup(self, sockets=None):
        await super().startup(sockets)
        self.listening.set()

    async def shutdown(self, sockets=None):
        self.on_stop()
        await super().shutdown(sockets)


@contextmanager
def running(service, *, ready=True, mounted=lambda app: app, on_stop=lambda: None, **options):
    """The service's address, such as http://127.0.0.1:12345."""
    warm = threading.Event()
    if ready:
        service.on_ready = warm.set
    config = uvicorn.Config(mounted(create_app(service)), port=0, log_level="warning", timeout_graceful_shutdown=5, **options)
    server = Server(config, on_stop)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert server.listening.wait(60)
    assert not ready or warm.wait(60)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
