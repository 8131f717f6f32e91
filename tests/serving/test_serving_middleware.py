"""The guard before somebody else's application: what reaches it is safe, and whatever cannot be read does not reach it."""

import asyncio
import json
import threading

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_stand_ins import Stage, default_policy, quick_policy
from starlette.websockets import WebSocketDisconnect

from valign.guard import Guard
from valign.serving.middleware import GuardMiddleware

GUARD = Guard.from_policy(quick_policy())
CORPSE, MOSSY = "a corpse on the beach", "a mossy fallen tree on the beach"


class Inner:
    """An application that remembers the bodies it was given, and their announced lengths."""

    def __init__(self):
        self.bodies = []

    async def __call__(self, scope, receive, send):
        body = (await receive())["body"] if scope["type"] == "http" else None
        self.bodies.append(body)
        assert scope["type"] != "http" or dict(scope["headers"]).get(b"content-length", b"%d" % len(body)) == b"%d" % len(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})


def ask(body, *, guard=GUARD, path="/draw", kind="http", method="POST", pieces=1, ends=True, **options):
    """What the application got, the status, and the error if there is one."""
    inner, sent = Inner(), []
    whole = body if isinstance(body, bytes) else json.dumps(body).encode()
    cut = -(-len(whole) // pieces) or 1
    parts = [whole[i : i + cut] for i in range(0, len(whole), cut)] or [b""]
    messages = iter([{"type": "http.request", "body": part, "more_body": not ends or part is not parts[-1]} for part in parts])

    async def receive():
        try:
            return next(messages)
        except StopIteration:
            await asyncio.Event().wait()  # a client that sends no more

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "method": method, "headers": [(b"content-length", b"%d" % len(whole)), (b"x-own", b"1")]}
    asyncio.run(GuardMiddleware(inner, guard, paths=["/draw"], **options)(scope, receive, send))
    error = json.loads(sent[1]["body"])["error"] if sent[0]["status"] != 200 else None
    return inner.bodies, sent[0]["status"], error


@pytest.mark.parametrize(("prompt", "safe"), [("a cat on a sofa", "a cat on a sofa"), (CORPSE, MOSSY)])
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_prompt_goes_on_safe_and_all_else_as_it_was(prompt, safe, pieces):
    bodies, status, _ = ask({"prompt": prompt, "steps": 7, "style": None}, pieces=pieces)
    assert (status, [json.loads(body) for body in bodies]) == (200, [{"prompt": safe, "steps": 7, "style": None}])


def test_a_name_that_stands_twice_is_read_once():
    bodies, _, _ = ask(b'{"prompt": "a cat", "prompt": "a corpse on the beach"}')
    assert [json.loads(body) for body in bodies] == [{"prompt": MOSSY}]
    assert b"corpse" not in bodies[0]


def test_every_named_field_is_guarded():
    found = ask({"prompt_2": CORPSE, "text": CORPSE}, fields=("prompt", "prompt_2"))[0]
    assert json.loads(found[0]) == {"prompt_2": MOSSY, "text": CORPSE}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"prompt=a+cat", None),
        (b"[" * 100_000, None),
        (["a cat"], None),
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"Prompt": "a cat"}, "prompt"),
        ({"prompt": ["a cat"]}, "prompt"),
        ({"prompt": " "}, "prompt"),
        ({"prompt": "a\u0000b"}, "prompt"),
        ({"prompt": "x" * 5000}, "prompt"),
    ],
)
def test_what_is_not_a_prompt_goes_nowhere(body, param):
    bodies, status, error = ask(body)
    assert (bodies, status, error["param"], error["type"]) == ([], 400, param, "invalid_request_error")


def test_a_blocked_prompt_is_openais_error():
    bodies, status, error = ask({"prompt": "Привет, большой мир"})
    assert (bodies, status, error["code"]) == ([], 400, "moderation_blocked")
    assert error["moderation_details"] == {"moderation_stage": "input", "categories": []}


def test_a_check_that_is_down_lets_nothing_through():
    bodies, status, error = ask({"prompt": "a cat"}, guard=Guard(default_policy(), [Stage(fails=True)]))
    assert (bodies, status, error["code"]) == ([], 503, "check_unavailable")


def test_a_body_has_its_limits():
    body = b'{"prompt": "a cat"}'
    for limit, status in ((len(body), 200), (len(body) - 1, 413)):
        assert ask(body, pieces=2, max_body=limit)[1] == status
    assert ask(body, ends=False, body_timeout=0.05)[1] == 408


@pytest.mark.parametrize("other", [{"path": "/other"}, {"path": "/draw/"}, {"kind": "lifespan"}])
def test_all_else_passes_unread(other):
    bodies, status, _ = ask(b"\xffanything", **other)
    assert (status, bodies) == (200, [None if "kind" in other else b"\xffanything"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.text(max_size=60) | st.sampled_from([CORPSE, "a naked man", "a n4ked man"]))
def test_what_arrives_passes_the_guard(prompt):
    for body in ask({"prompt": prompt})[0]:
        assert GUARD.passes(json.loads(body)["prompt"])


@pytest.mark.parametrize("wrong", [{"paths": []}, {"paths": ["/x"], "fields": ()}])
def test_refuses_to_guard_nothing(wrong):
    with pytest.raises(ValueError, match="must have paths and fields to guard"):
        GuardMiddleware(Inner(), GUARD, **wrong)


def fastapi_app(**options):
    app = FastAPI(**options)

    @app.post("/draw")
    async def draw(body: dict):
        return body

    @app.get("/models/{name}/draw")
    async def named(prompt: str = ""):
        return prompt

    return app


def guarded(paths=("/draw",), **options):
    app = fastapi_app(**options)
    app.add_middleware(GuardMiddleware, guard=GUARD, paths=paths)
    return app


def mounted():
    outer = FastAPI()
    outer.mount("/api", guarded())
    return outer


@pytest.mark.parametrize(
    ("app", "root", "path"),
    [
        (guarded(), "", "/draw"),
        (guarded(), "", "/draw%0A"),  # a router's pattern ends before a last line break
        (guarded(), "/api", "/draw"),  # a proxy took the prefix off
        (guarded(), "/api", "/api/draw"),  # a proxy that left it
        (guarded(root_path="/api"), "", "/draw"),
        (mounted(), "", "/api/draw"),
        (mounted(), "/v2", "/api/draw"),
        (GuardMiddleware(fastapi_app(), GUARD, paths=["/draw"]), "", "/draw"),
    ],
)
def test_what_the_router_finds_is_guarded(app, root, path):
    with TestClient(app, root_path=root) as client:
        answer = client.post(path, json={"prompt": CORPSE})
    assert answer.status_code == 404 or answer.json() == {"prompt": MOSSY}
    assert "%0A" in path or path == "/api/draw" or answer.status_code == 200


def test_prompts_outside_of_a_body_do_not_get_through():
    with TestClient(guarded(["/draw", "/models/{name}/draw"])) as client:
        assert client.get("/models/a/draw").json() == ""
        for answer in (
            client.get("/models/a/draw", params={"prompt": CORPSE}),
            client.post("/draw?prompt=x", json={"prompt": "a cat"}),
            client.request("GET", "/models/a/draw", content=b"prompt"),
        ):
            assert answer.status_code == 400
            assert "corpse" not in answer.text
    with pytest.raises(WebSocketDisconnect), TestClient(guarded()).websocket_connect("/draw"):
        pass


def test_refuses_to_start_before_routes_that_are_not_there():
    for app, path in ((fastapi_app(), "/generate"), (mounted(), "/draw"), (guarded(), "/api/draw")):
        with pytest.raises(ValueError, match=rf"paths must be routes of the application, got {path}\. It has /"):
            GuardMiddleware(app, GUARD, paths=[path])
    for app, path in ((mounted(), "/api/draw"), (fastapi_app(), "/models/{name}/draw"), (fastapi_app(), "/models/one/draw")):
        GuardMiddleware(app, GUARD, paths=[path])


def test_a_guard_that_hangs_lets_nothing_through():
    wait = threading.Event()
    bodies, status, error = ask({"prompt": "a cat"}, guard=Guard(default_policy(), [Stage(wait=wait)]), check_timeout=0.1)
    assert (bodies, status, error["code"]) == ([], 503, "check_unavailable")
    wait.set()
