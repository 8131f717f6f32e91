"""The guard with a chat model behind a real endpoint, in another process: good, plain, slow, dead, and full of rubbish."""

import subprocess
import sys
from pathlib import Path

import pytest

from valign.guard import Guard
from valign.guard.rewriting.chat import ask, schema_of
from valign.models.language.breaker import CircuitBreaker
from valign.models.language.chat import ChatUnavailable, OpenAIChat

UNSAFE = "a corpse on the beach at dawn, wide shot"
SERVER = Path(__file__).parent.parent / "chat_server.py"


def start():
    process = subprocess.Popen([sys.executable, str(SERVER)], stdout=subprocess.PIPE, text=True)
    return process, f"http://127.0.0.1:{process.stdout.readline().strip()}"


@pytest.fixture(scope="module")
def address():
    process, url = start()
    yield url
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def chat(address, behaviour, **options):
    options = {"retries": 0, "timeout": 5.0, "temperature": 0.0} | options
    return OpenAIChat(base_url=f"{address}/{behaviour}/v1", model="tiny", **options)


@pytest.mark.parametrize("behaviour", ["good", "plain"])
def test_judges_and_rewrites(policy, address, behaviour):
    guard = Guard.from_policy(policy, chat=chat(address, behaviour))
    assert guard.guard("a lighthouse at dawn").action == "allow"
    result = guard.guard(UNSAFE)
    assert (result.prompt, result.decision.intent) == ("a mossy fallen tree on the beach at dawn, wide shot", "harmful")
    assert [attempt.source for attempt in result.attempts] == ["chat"]


@pytest.mark.parametrize("behaviour", ["slow", "drip", "dead", "cut", "down", "rubbish", "liar"])
def test_a_bad_endpoint_blocks_and_says_which_stage_failed(policy, address, behaviour):
    guard = Guard.from_policy(policy, chat=chat(address, behaviour, timeout=0.4))
    for prompt, stage in (("a lighthouse at dawn", "values-chat"), (UNSAFE, "intention-chat")):
        result = guard.guard(prompt)
        assert (result.blocked, result.prompt) == (True, None)
        assert stage in result.decision.error
        assert ("UnreadableAnswer" if behaviour == "liar" else "ChatUnavailable") in result.decision.error


def test_a_drip_is_given_up_in_time(address):
    with pytest.raises(ChatUnavailable, match=r"did not answer within 0\.4 s"):
        ask(chat(address, "drip", timeout=0.4), "Say yes.", {"caption": "a cat"}, schema_of(prompt={"type": "string"}))


def test_an_endpoint_that_dies_is_left_alone_and_found_again(policy):
    process, url = start()
    now = [0.0]
    breaker = CircuitBreaker(chat(url, "good"), failures=2, rest=30.0, clock=lambda: now[0])
    guard = Guard.from_policy(policy, chat=breaker)
    assert guard.check("a lighthouse at dawn").action == "allow"
    process.kill()
    process.wait()
    assert guard.check("a lighthouse at dawn").action == "block"
    assert breaker.state == "open"  # the batch and the single try
    assert guard.check("a red boat").action == "block"
    process, breaker.chat = (new := start())[0], chat(new[1], "good")
    try:
        assert guard.check("a red boat").action == "block"  # still left alone
        now[0] = 31.0
        assert guard.check("a red boat").action == "allow"
        assert breaker.state == "closed"
    finally:
        process.kill()
        process.wait()
