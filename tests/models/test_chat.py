"""The OpenAI client against a real server on this machine: good, slow, dead, refusing and rubbish answers."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from valign.checks import UserError
from valign.models.language.chat import ChatModel, ChatRefused, ChatUnavailable, OpenAIChat, ScriptedChat

ASK = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Say yes."}]
KEY = "sk-very-secret-key"


def completion(content):
    message = {"role": "assistant", "content": content}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [{"index": 0, "message": message}]}


class Endpoint:
    """A server that answers with what the test says: ``(status, body, content type)`` per request, the last one for ever."""

    def __init__(self):
        self.answers, self.requests = [(200, completion(" yes \n"), "application/json")], []
        self.ready = threading.Event()  # to answer
        self.ready.set()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                endpoint.requests.append((self.path, self.headers.get("Authorization"), json.loads(body)))
                endpoint.ready.wait()
                status, answer, kind = endpoint.answers[min(len(endpoint.requests), len(endpoint.answers)) - 1]
                if status is None:
                    self.connection.close()
                    return
                data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client gave up waiting

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self):
        self.ready.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Endpoint()
    yield server
    server.close()


def chat(endpoint, **options):
    return OpenAIChat(**{"base_url": endpoint.url, "model": "tiny", "retries": 0, "timeout": 5.0, **options})


def test_asks_and_reads_the_answer(endpoint, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    model = chat(endpoint, api_key_env="MY_KEY", temperature=0.2, seed=7, max_tokens=9)
    assert isinstance(model, ChatModel)
    assert model.complete(ASK) == "yes"
    path, authorization, body = endpoint.requests[0]
    assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert body == {"model": "tiny", "messages": ASK, "temperature": 0.2, "seed": 7, "max_tokens": 9}
    assert KEY not in repr(model)


def test_an_endpoint_without_keys_gets_none_of_ours(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    chat(endpoint).complete(ASK)
    _, authorization, body = endpoint.requests[0]
    assert authorization == "Bearer none"
    assert "seed" not in body


def test_tries_again_after_a_server_error(endpoint):
    endpoint.answers.insert(0, (500, {"error": {"message": "hiccup"}}, "application/json"))
    assert chat(endpoint, retries=1).complete(ASK) == "yes"
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, r"answered with status 400: .*overheated.*Check the model's name and the options"),
        (401, r"refused the key \(status 401\)\. Name the variable that holds the key"),
        (404, r"answered with status 404: .*Check the model's name and that the address ends in /v1"),
        (429, r"answered with status 429: .*Wait a while"),
        (503, r"answered with status 503: .*Try again later, or look into the server's log"),
    ],
)
def test_a_refusal_says_who_what_and_how_to_mend_it(endpoint, status, message):
    endpoint.answers = [(status, {"error": {"message": "overheated"}}, "application/json")]
    with pytest.raises(UserError, match=rf"The chat model tiny at {endpoint.url} {message}"):
        chat(endpoint).complete(ASK)
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("<html>It works!</html>", "text/html", "sent something that is not a chat completion.*OpenAI-compatible"),
        ('{"choices": [', "application/json", "sent something that is not a chat completion.*OpenAI-compatible"),
        ("[" * 100_000, "application/json", "sent something that is not a chat completion"),
        ({}, "application/json", "sent something that is not a chat completion"),
        ({"choices": []}, "application/json", "sent something that is not a chat completion"),
        ({"choices": [{"message": {"content": None}}]}, "application/json", "sent something that is not a chat completion"),
        ({"choices": [{"message": {"content": [1]}}]}, "application/json", "sent something that is not a chat completion"),
        ({"choices": "none"}, "application/json", "sent something that is not a chat completion"),
        ([1, 2], "application/json", "sent something that is not a chat completion"),
        ("", "application/json", "sent something that is not a chat completion"),
        (completion("  \n"), "application/json", "sent an empty text. Raise max_tokens"),
    ],
)
def test_rubbish_is_no_answer(endpoint, body, kind, message):
    endpoint.answers = [(200, body, kind)]
    with pytest.raises(UserError, match=message):
        chat(endpoint).complete(ASK)


def test_a_slow_endpoint_is_given_up(endpoint):
    endpoint.ready.clear()
    with pytest.raises(UserError, match=r"did not answer within 0\.1 s\. Raise the timeout"):
        chat(endpoint, timeout=0.1).complete(ASK)


def test_a_dead_endpoint_is_named(endpoint):
    endpoint.answers = [(None, "", "")]
    with pytest.raises(ChatUnavailable, match="cannot be reached"):
        chat(endpoint).complete(ASK)
    endpoint.close()
    with pytest.raises(UserError, match=rf"{endpoint.url} cannot be reached\. Check the address, and that the server is running"):
        chat(endpoint).complete(ASK)


@pytest.mark.parametrize(
    ("status", "kind"), [(400, ChatRefused), (404, ChatRefused), (401, ChatUnavailable), (503, ChatUnavailable)]
)
def test_a_bad_request_is_no_dead_endpoint(endpoint, status, kind):
    endpoint.answers = [(status, {"error": {"message": "no"}}, "application/json")]
    with pytest.raises(kind):
        chat(endpoint).complete(ASK)


SCHEMA = {"type": "object", "properties": {"verdict": {"type": "string"}}, "required": ["verdict"], "additionalProperties": False}


def test_a_schema_goes_out_as_response_format(endpoint):
    assert chat(endpoint).complete(ASK, schema=SCHEMA) == "yes"
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    assert endpoint.requests[0][2]["response_format"] == wanted


def test_an_endpoint_that_knows_no_schema_is_asked_without_one_from_then_on(endpoint):
    endpoint.answers.insert(0, (400, {"error": {"message": "unknown field response_format"}}, "application/json"))
    model = chat(endpoint)
    assert [model.complete(ASK, schema=SCHEMA), model.complete(ASK, schema=SCHEMA)] == ["yes", "yes"]
    assert ["response_format" in body for _, _, body in endpoint.requests] == [True, False, False]


def test_a_request_that_is_bad_anyway_says_nothing_about_schemas(endpoint):
    too_long = (400, {"error": {"message": "too long"}}, "application/json")
    endpoint.answers[:0] = [too_long, too_long]
    model = chat(endpoint)
    with pytest.raises(ChatRefused, match="too long"):
        model.complete(ASK, schema=SCHEMA)
    model.complete(ASK, schema=SCHEMA)
    assert ["response_format" in body for _, _, body in endpoint.requests] == [True, False, True]


@pytest.mark.parametrize("status", [400, 401, 500])
def test_the_key_is_in_no_message(endpoint, monkeypatch, caplog, status):
    monkeypatch.setenv("MY_KEY", KEY)
    endpoint.answers = [(status, {"error": {"message": f"Incorrect key {KEY} given"}}, "application/json")]
    with caplog.at_level("DEBUG"), pytest.raises(UserError) as caught:
        chat(endpoint, api_key_env="MY_KEY").complete(ASK)
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert KEY not in "".join(record.getMessage() for record in caplog.records if record.name.startswith("valign"))


def test_the_variable_of_the_key_must_be_set(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(UserError, match="The variable MY_KEY must hold the key for http://x/v1, got nothing"):
        OpenAIChat(base_url="http://x/v1", model="m", api_key_env="MY_KEY")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_url": "127.0.0.1:8000"}, r"base_url must be an http\(s\) address, got '127"),
        ({"model": ""}, "model must be the name of a model"),
        ({"timeout": 0.0}, r"timeout must be in \(0, inf\)"),
        ({"retries": -1}, r"retries must be in \[0, inf\)"),
        ({"temperature": 2.5}, r"temperature must be in \[0, 2\]"),
        ({"max_tokens": 0}, r"max_tokens must be in \[1, inf\)"),
    ],
)
def test_refuses_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        OpenAIChat(**{"base_url": "http://x/v1", "model": "m", **change})


def test_scripted_answers_come_in_order_and_run_out():
    script = ScriptedChat(["one", "two"])
    assert isinstance(script, ChatModel)
    assert [script.complete(ASK), script.complete(ASK)] == ["one", "two"]
    assert script.calls == [ASK, ASK]
    with pytest.raises(ValueError, match="must hold an answer per call, got 2"):
        script.complete(ASK)
    assert ScriptedChat(lambda messages: messages[-1]["content"].upper()).complete(ASK) == "SAY YES."
