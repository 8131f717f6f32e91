"""Limits hold for every route, and the log's first entry says what is at work."""

import hashlib
import http.client
import json
from urllib.parse import urlparse

import pytest
from serving_stand_ins import Watcher, ask, make_service, quick_policy, running

from valign.guard import Guard
from valign.guard.head.learned import SHIPPED
from valign.models.encoders.minilm import SHA256
from valign.serving.audit_store import AuditStore
from valign.serving.gate import NO_BODY, PAGE_BODY


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gate")
    guard = Guard.from_policy(quick_policy(stages=["lexical", "learned"]), detector=Watcher())
    with running(make_service(folder, guard=guard, about={"adapters": {"safe": "ab" * 32}})) as url:
        yield url, folder


@pytest.mark.parametrize("method", ["POST", "PUT", "GET"])
@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics", "/nothing/there", "/v1/models", "/v1/nothing"])
def test_a_body_that_no_route_asked_for_is_not_read(served, method, path):
    place = urlparse(served[0])
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    connection.putrequest(method, path)
    connection.putheader("content-length", str(2**30))  # nothing of it is ever sent: the answer does not wait for it
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_a_body_without_a_length_is_cut_off(served):
    place = urlparse(served[0])
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    connection.request(
        "POST", "/nothing/there", body=iter([b"x" * 2**13] * 3), encode_chunked=True, headers={"transfer-encoding": "chunked"}
    )
    assert connection.getresponse().status == 413
    connection.close()


def test_small_bodies_and_the_routes_own_pass(served):
    url = served[0]
    assert ask(f"{url}/nothing/there", b"x" * NO_BODY).status == 404
    assert ask(f"{url}/v1/moderations", {"input": ["a cat " * 500] * 8}).status == 200
    assert NO_BODY < PAGE_BODY


def test_the_start_entry_names_all_that_is_at_work(served):
    start = json.loads(next(iter(AuditStore(str(served[1] / "audit.db")).links())).body)
    policy = quick_policy(stages=["lexical", "learned"])
    assert (start["kind"], start["policy"]) == ("start", policy.fingerprint())
    assert start["stages"]["learned"] == {"weights": hashlib.sha256(SHIPPED.read_bytes()).hexdigest(), "encoder": SHA256}
    assert start["model_sha256"] == "0" * 64
    assert start["detector_sha256"] == "0" * 64
    assert start["adapters"] == {"safe": "ab" * 32}
    assert (start["block_rules"], start["gaps"], start["canaries"]) == (["minors-sexual"], [], "right")


def test_a_policy_without_block_rules_is_said_at_the_start(tmp_path, caplog):
    guard = Guard.from_policy(quick_policy().model_copy(update={"always_block": []}))
    with running(make_service(tmp_path, guard=guard)):
        pass
    start = json.loads(next(iter(AuditStore(str(tmp_path / "audit.db")).links())).body)
    assert start["block_rules"] == []
    assert "has no block rules" in start["gaps"][0]
    assert "has no block rules" in caplog.text
