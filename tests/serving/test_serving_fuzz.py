"""Whatever is sent: an answer in the API's shape, never a crash, never an image that nobody checked."""

from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving_stand_ins import Stage, Watcher, ask, default_policy, make_service, quick_policy, running

from valign.guard import Guard
from valign.serving.app import create_app
from valign.serving.keys import Keys
from valign.serving.settings import Settings

KEY = "the-key-of-these-tests"
IMAGES, MODERATIONS = "/v1/images/generations", "/v1/moderations"
ROUGH = settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])

alphabets = [
    st.characters(),  # any, control characters and unassigned ones too
    st.characters(min_codepoint=0x0590, max_codepoint=0x08FF),  # right to left
    st.characters(min_codepoint=0x1F300, max_codepoint=0x1FAFF),  # emoji
    st.sampled_from("\u200b\u200d\u202e\ufe0f\u0301a e"),  # invisible, joining, turning, combining
    st.sampled_from("a corpse naked gun child ,."),
]
prompts = st.sampled_from(alphabets).flatmap(lambda one: st.text(one, max_size=200)) | st.text(max_size=20).map(
    lambda text: text * 100
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | prompts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(prompts, inner, max_size=3), max_leaves=8
)
FIELDS = (
    "prompt",
    "n",
    "size",
    "quality",
    "style",
    "output_format",
    "output_compression",
    "seed",
    "steps",
    "guidance_scale",
    "user",
)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    guard = Guard.from_policy(quick_policy(), detector=Watcher())
    small = Settings(names=("tiny",), steps=4, batch_wait=0.0, max_body=500_000)
    keys = Keys.load(environment=KEY)
    with running(make_service(tmp_path_factory.mktemp("fuzz"), guard=guard, keys=keys, settings=small)) as url:
        yield url


def post(url, body):
    return ask(url, body, key=KEY)


def check(reply):
    """An answer that may leave: a checked image, or an error of the one form."""
    body = reply.json()
    if reply.status == 200:
        assert body.get("guard") is not None
        if "data" in body:
            assert body["data"]
            assert body["guard"]["checked"]
        else:
            assert all(one["flagged"] == any(one["categories"].values()) for one in body["results"])
    else:
        assert reply.status in (400, 401, 404, 413), body
        assert {"message", "type", "param", "code"} <= set(body["error"])
    assert reply.headers["x-request-id"].startswith("req_")


@ROUGH
@given(prompt=prompts)
def test_any_prompt(served, prompt):
    check(post(served + IMAGES, {"prompt": prompt}))
    check(post(served + MODERATIONS, {"input": [prompt, "a cat"]}))


@ROUGH
@given(prompt=st.text(max_size=5).map(lambda text: f"{text}\ud83d{text}"))
def test_broken_unicode(served, prompt):
    for route, field in ((IMAGES, "prompt"), (MODERATIONS, "input")):
        assert post(served + route, {field: prompt}).status == 400


@ROUGH
@given(body=values)
def test_any_json(served, body):
    for route in (IMAGES, MODERATIONS):
        check(post(served + route, body if body is not None else b"null"))


@ROUGH
@given(fields=st.dictionaries(st.sampled_from(FIELDS), values, max_size=4))
def test_any_value_in_any_field(served, fields):
    check(post(served + IMAGES, {"prompt": "a cat on a sofa", **fields}))


@ROUGH
@given(body=st.binary(max_size=300) | st.binary(max_size=50).map(lambda part: b'{"prompt":"' + part + b'"}'))
def test_any_bytes(served, body):
    check(post(served + IMAGES, body))


@ROUGH
@given(
    headers=st.dictionaries(
        st.sampled_from(["authorization", "content-type", "x-request-id", "accept"]),
        st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=40),
    )
)
def test_any_header(served, headers):
    check(ask(served + MODERATIONS, {"input": "a cat"}, headers={"authorization": f"Bearer {KEY}", **headers}))


def test_a_megabyte(served):
    connection = HTTPConnection(urlsplit(served).netloc, timeout=30)
    connection.putrequest("POST", IMAGES)
    for name, value in {"authorization": f"Bearer {KEY}", "content-type": "application/json", "content-length": "1000016"}.items():
        connection.putheader(name, value)
    connection.endheaders()  # refused by its length alone: a client that wrote it all might find the connection closed
    assert connection.getresponse().status == 413
    connection.close()
    assert post(served + IMAGES, b"[" * 400_000).status == 400
    assert post(served + MODERATIONS, {"input": ["x" * 400_000]}).status == 400


@given(prompt=prompts)
@ROUGH
def test_no_prompt_gets_past_a_stage_that_always_fails(down, prompt):
    url, model = down
    calls = len(model.calls)
    assert ask(url + IMAGES, {"prompt": prompt}).status in (400, 503)
    assert ask(url + MODERATIONS, {"input": prompt}).status in (400, 503)
    assert len(model.calls) == calls


@pytest.fixture(scope="module")
def down(tmp_path_factory):
    from serving_stand_ins import Model

    stage, model = Stage(), Model()
    service = make_service(tmp_path_factory.mktemp("down"), guard=Guard(default_policy(), [stage]), model=model)
    with running(service) as url:
        stage.fails = True
        yield url, model


def described():
    """The application's own OpenAPI description; nothing is loaded for it."""
    import tempfile
    from pathlib import Path

    return create_app(make_service(Path(tempfile.mkdtemp()))).openapi()


api = schemathesis.openapi.from_dict(described())
api.config.generation.update(modes=list(schemathesis.GenerationMode))


@pytest.fixture(scope="module")
def base_url(served):
    return served


@api.parametrize()
@settings(max_examples=12, suppress_health_check=list(HealthCheck))
def test_the_openapi_description_is_kept(case, base_url):
    beyond = [positive_data_acceptance]  # a schema cannot say what makes a prompt visible, or an image whole
    case.call_and_validate(base_url=base_url, headers={"Authorization": f"Bearer {KEY}"}, excluded_checks=beyond)
