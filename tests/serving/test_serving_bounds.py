"""One request must not stop the others: bounds before work, threads with deadlines, clients and keys that go away."""

import base64
import io
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from serving_stand_ins import Model, Stage, Watcher, ask, default_policy, make_service, quick_policy, running, until

from valign.guard import Guard
from valign.serving.json_body import MAX_NESTING, MAX_VALUES
from valign.serving.keys import Keys, gone
from valign.serving.server import MAX_HEAD, BoundedHttp
from valign.serving.service import Rules
from valign.serving.settings import Settings

KEY, OTHER = "the-key-of-these-tests", "another-key-of-these-tests"
IMAGES, MODERATIONS = "/v1/images/generations", "/v1/moderations"


def settings(**changes):
    return Settings(**{"names": ("tiny",), "steps": 4, "batch_wait": 0.0, **changes})


def part(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    url = f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def connect(url):
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30)


def post(url, route, body):
    """A connection on which a request was sent, and nothing read."""
    data = json.dumps(body).encode()
    connection = connect(url)
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ",
        b"GET /",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(9)),
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX: ",  # headers behind a body
    ],
)
def test_a_head_without_end_is_refused(tmp_path, head):
    with running(make_service(tmp_path), http=BoundedHttp) as url, connect(url) as connection:
        connection.sendall(head)
        found = b""
        try:
            for _ in range(4 * MAX_HEAD // 1024):
                connection.sendall(b"y" * 1024)
            while piece := connection.recv(10_000):
                found += piece
        except OSError:
            pass  # closed while it was written to
        assert b"HTTP/1.1 431 " in found or not found
        assert ask(f"{url}/healthz", headers={"x-long": "y" * (MAX_HEAD // 2)}).status == 200
        assert ask(f"{url}{MODERATIONS}", {"input": "a cat " * 600}).status == 200


def test_a_body_for_no_route_is_not_read(tmp_path):
    with running(make_service(tmp_path)) as url, connect(url) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")  # it would wait for the body


def test_who_sends_all_of_a_refused_body_gets_the_answer(tmp_path):
    sent = 30_000_000  # more than the buffers of a connection hold
    with running(make_service(tmp_path), http=BoundedHttp) as url, connect(url) as connection:
        connection.sendall(
            f"POST /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {sent}\r\n\r\n".encode() + b"x" * sent
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "body",
    [
        b'{"input": ' + b"[" * (MAX_NESTING + 1) + b"]" * (MAX_NESTING + 1) + b"}",
        b'{"input": [' + b'"a",' * MAX_VALUES + b'"a"]}',
        b'{"input": ' + b'{"a":1,' * MAX_VALUES,
        b'{"input": "' + b'\\"' * 100_000,
        b'{"input": ' + b"9" * 10_000 + b"}",
    ],
)
def test_the_shape_of_a_body_is_bounded(tmp_path, body):
    with running(make_service(tmp_path)) as url:
        found = ask(url + MODERATIONS, body)
        assert (found.status, found.json()["error"]["code"]) == (400, "invalid_json")
        assert (
            ask(url + MODERATIONS, {"input": ["a, [cat], {dog}, \\" + "," * 2000] * 5}).status == 200
        )  # signs in texts are no values


def test_a_request_has_a_bound_on_its_texts(tmp_path):
    with running(make_service(tmp_path, settings=settings(max_text=100))) as url:
        assert ask(url + MODERATIONS, {"input": ["x" * 50] * 2}).status == 200
        found = ask(url + MODERATIONS, {"input": ["x" * 50, "x" * 51]})
        assert (found.status, found.json()["error"]["message"]) == (400, "input must have at most 100 characters in all.")


def test_the_pixels_of_all_images_and_frames_count_together(tmp_path):
    guard = Guard.from_policy(quick_policy(), detector=Watcher())
    with running(make_service(tmp_path, guard=guard, settings=settings(max_pixels=300))) as url:
        small = part(Image.new("RGB", (10, 10)))
        frames = [Image.new("RGB", (10, 10), (n, n, n)) for n in (0, 90, 180, 250)]
        for images, status in (
            ([small] * 3, 200),
            ([small] * 4, 400),
            ([part(frames[0], "GIF", save_all=True, append_images=frames[1:])], 400),
            ([part(frames[0], "GIF", save_all=True, append_images=frames[1:3])], 200),
        ):
            found = ask(url + MODERATIONS, {"input": images})
            assert found.status == status, found.content
            assert status == 200 or "at most 300 pixels" in found.json()["error"]["message"]


def test_every_frame_of_an_animation_is_looked_at(tmp_path):
    guard = Guard.from_policy(quick_policy(), detector=Watcher(flags=[4]))
    with running(make_service(tmp_path, guard=guard)) as url:
        frames = [Image.fromarray(np.full((9, 9, 3), (red, 0, 0), np.uint8)) for red in (90, 5, 200)]
        for images, flagged in ((frames, True), (frames[:1] + frames[2:], False)):
            found = ask(url + MODERATIONS, {"input": [part(images[0], "PNG", save_all=True, append_images=images[1:])]})
            assert found.json()["results"][0]["flagged"] is flagged


def test_a_client_that_hangs_up_gives_its_places_back(tmp_path):
    model = Model(wait=threading.Event())
    service = make_service(tmp_path, model=model, settings=settings(max_images=20, batch_size=2))
    with running(service) as url:
        first = post(url, IMAGES, {"prompt": "a cat", "n": 2})
        assert model.called.wait(10)
        second = post(url, IMAGES, {"prompt": "a dog", "n": 10})
        taken = b'valign_under_way{queue="pictures"} %.1f'
        until(lambda: taken % 12 in service.metrics.text())
        second.close()
        until(lambda: taken % 2 in service.metrics.text())  # those that the model has begun stay
        model.wait.set()
        first.recv(1000)
        first.close()
    assert sum(len(prompts) for prompts, _, _ in model.calls) == 3  # the warm-up, and the first request


class Hanging(Watcher):
    """A detector that hangs while the event is not set."""

    def __init__(self, go):
        super().__init__()
        self.go = go

    def detect(self, images):
        self.go.wait(20)
        return super().detect(images)


def test_a_detector_that_hangs_is_given_up_and_the_next_image_is_looked_at(tmp_path):
    go = threading.Event()
    go.set()
    guard = Guard.from_policy(quick_policy(), detector=Hanging(go))
    with running(make_service(tmp_path, guard=guard, settings=settings(check_timeout=0.2))) as url:
        body, drawn = {"input": [part(Image.new("RGB", (8, 8)))]}, {"prompt": "a cat"}
        go.clear()
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda one: ask(url + one[0], one[1]), [(MODERATIONS, body), (IMAGES, drawn)] * 4))
        assert {(one.status, one.json()["error"]["code"]) for one in found} == {(503, "check_unavailable")}
        go.set()
        assert ask(url + MODERATIONS, body).status == 200
        assert ask(url + IMAGES, drawn).status == 200


class Panic(BaseException):
    """As a library in another language raises it."""


def test_a_stage_that_hangs_or_panics_ends_no_thread(tmp_path, monkeypatch):
    stage = Stage()
    with running(make_service(tmp_path, guard=Guard(default_policy(), [stage]), settings=settings(check_timeout=0.2))) as url:
        stage.wait = threading.Event()
        assert ask(url + MODERATIONS, {"input": "a cat"}).status == 503
        stage.wait.set()
        monkeypatch.setattr(Guard, "check_many", lambda *arguments, **options: (_ for _ in ()).throw(Panic))
        assert ask(url + MODERATIONS, {"input": "a cat"}).status == 503
        monkeypatch.undo()
        until(lambda: ask(url + MODERATIONS, {"input": "a cat"}).status == 200)  # 0.2 s are short on a busy machine


def test_a_model_that_hangs_is_an_answer(tmp_path):
    model = Model(wait=threading.Event())
    with running(make_service(tmp_path, model=model, settings=settings(stall=0.2))) as url:
        found = ask(url + IMAGES, {"prompt": "a cat"})
        assert (found.status, found.json()["error"]["code"]) == (503, "model_unavailable")
        model.wait.set()
        until(lambda: ask(url + IMAGES, {"prompt": "a cat"}).status == 200)  # 0.2 s are short on a busy machine


def test_refused_requests_count_against_the_rate(tmp_path):
    keys = Keys.load(environment=KEY)
    with running(make_service(tmp_path, keys=keys, settings=settings(per_minute=4, max_body=1000))) as url:
        for body, status in ((b"{", 400), ({"input": "x" * 2000}, 413), ({"prompt": 3}, 400), ({"input": "a cat"}, 200)):
            assert ask(url + MODERATIONS, body, key=KEY).status == status
        assert ask(url + MODERATIONS, {"input": "a cat"}, key=KEY).status == 429


def test_each_text_counts_against_the_rate(tmp_path):
    keys = Keys.load(environment=KEY)
    with running(make_service(tmp_path, keys=keys, settings=settings(per_minute=5))) as url:
        assert ask(url + MODERATIONS, {"input": ["a cat"] * 4}, key=KEY).status == 200
        assert ask(url + MODERATIONS, {"input": ["a cat"] * 2}, key=KEY).status == 429


def test_a_key_that_is_taken_away_ends_what_it_has_open(tmp_path):
    import asyncio

    model, guard = Model(wait=threading.Event()), Guard.from_policy(quick_policy())
    made = iter([Rules(guard, Keys.load(environment=f"{KEY} {OTHER}")), Rules(guard, Keys.load(environment=KEY))])
    service = make_service(tmp_path, model=model, load_rules=lambda: next(made))
    loops, start = [], service.start

    async def remembered():
        loops.append(asyncio.get_running_loop())
        await start()

    service.start = remembered
    told = []
    service.sessions.on_end.append(told.append)
    with running(service) as url, ThreadPoolExecutor(2) as pool:
        works = {key: pool.submit(ask, url + IMAGES, {"prompt": "a cat"}, key=key) for key in (KEY, OTHER)}
        assert model.called.wait(10)
        until(lambda: len(service.sessions._open) == 2)
        assert asyncio.run_coroutine_threadsafe(service.reload(), loops[0]).result(10)
        assert works[OTHER].result(10).status == 401
        model.wait.set()
        assert works[KEY].result(10).status == 200
    assert told == [{"environment-2"}]


def test_who_loses_a_key():
    one, two, changed = ({"a": "x"}, {"a": "x", "b": "y"}, {"c": "x"})
    assert gone(Keys(two), Keys(one)) == {"y"}
    assert gone(Keys(one), Keys(two)) == set()
    assert gone(Keys(one), Keys(changed)) == {"x"}  # a key in place of another
    assert gone(Keys(), Keys(one)) == {"anonymous"}


def test_keys_are_asked_for_below_a_root_path_too(tmp_path):
    with running(make_service(tmp_path, keys=Keys.load(environment=KEY)), root_path="/api") as url:
        for path in ("/v1/models", MODERATIONS):
            assert ask(url + path, None if path == "/v1/models" else {"input": "a cat"}).status == 401
        assert ask(url + MODERATIONS, {"input": "a cat"}, key=KEY).status == 200
