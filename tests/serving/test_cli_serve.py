"""``valign serve``, ``api-key`` and ``audit-log``, as a person types them."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import contextmanager

import openai
import pytest
from serving_stand_ins import ask, make_service
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli.root import build

runner = CliRunner(env={"COLUMNS": "200"})
SECRET = "a secret of these tests"
POLICY = "version: 1\nid: quick\ntitle: Quick\nextends: default\nguard: {stages: [lexical, values], max_chars: %d}\n"


class ServerProcess:
    """``valign serve`` in a folder, and all that it has written to its terminal."""

    def __init__(self, folder, *options):
        command = [sys.executable, "-m", "valign", "serve", "--guard", "policy.yaml", "--keys", "keys.txt", "--port", "0", *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = os.environ | {"VALIGN_AUDIT_KEY": SECRET, "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
        self.process, self.output = subprocess.Popen(command, cwd=folder, env=environment, **pipes), ""

    def until(self, words):
        """Read on until the words were written; the text behind them on their line."""
        while words not in self.output:
            line = self.process.stdout.readline()
            assert line, f"the server ended: {self.output}"
            self.output += line
        return self.output.split(words)[1].split("\n")[0]

    def stopped(self):
        """End it with SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        self.output += self.process.communicate(timeout=20)[0]
        return self.process.returncode


@contextmanager
def serving(folder, *options):
    """A server with a policy file and a key; its address, the key and the process."""
    (folder / "policy.yaml").write_text(POLICY % 40)
    key = runner.invoke(build(), ["api-key", "tests", "--keys", str(folder / "keys.txt")]).stdout.strip()
    server = ServerProcess(folder, *options)
    try:
        url = server.until("Uvicorn running on ").split()[0]
        server.until("Ready: ")
        yield url, key, server
    finally:
        server.process.kill()
        server.process.wait(20)


def test_a_day_in_the_life_of_a_server(tmp_path, tiny_sd, monkeypatch):
    options = ["--model", str(tiny_sd), "--detector", "none", "--steps", "1", "--device", "cpu", "--name", "small", "--rate", "60"]
    with serving(tmp_path, *options) as (url, key, server):
        assert ask(f"{url}/readyz").status == 200
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        found = client.images.generate(prompt="a corpse on the beach", model="small")
        assert found.data[0].revised_prompt == "a mossy fallen tree on the beach"
        assert not found.guard["checked"]
        assert "Images are not checked" in server.output

        (tmp_path / "policy.yaml").write_text("version: 1\ncategories: 3\n")
        server.process.send_signal(signal.SIGHUP)
        server.until("Nothing was reloaded")
        server.until("policy.yaml:2")
        assert client.moderations.create(input="a cat").results
        assert ask(f"{url}/readyz").json()["reload"] == "failed, see the log"

        (tmp_path / "policy.yaml").write_text(POLICY % 16)
        other = runner.invoke(build(), ["api-key", "other", "--keys", str(tmp_path / "keys.txt")]).stdout.strip()
        assert ask(f"{url}/v1/models", key=other).status == 401
        server.process.send_signal(signal.SIGHUP)
        server.until("Reloaded the keys and policy quick")
        assert ask(f"{url}/v1/models", key=other).status == 200
        assert ask(f"{url}/v1/moderations", {"input": "a cat on a very long sofa"}, key=key).status == 400

        assert server.stopped() in (0, -signal.SIGTERM)
    assert key not in server.output
    assert "corpse" not in server.output

    log = str(tmp_path / "valign-audit.db")
    verified = runner.invoke(build(), ["audit-log", "verify", log])
    assert (verified.exit_code, verified.stdout.split()[:2]) == (0, ["4", "entries,"])
    head = verified.stdout.split()[-1]
    assert runner.invoke(build(), ["audit-log", "verify", log, "--head", head]).exit_code == 0
    rows = runner.invoke(build(), ["audit-log", "tail", log, "-n", "3"]).stdout.splitlines()[1:]
    assert [row.split()[2] for row in rows] == ["draw", "check", "reload"]
    monkeypatch.setenv("VALIGN_AUDIT_KEY", SECRET)
    shown = json.loads(runner.invoke(build(), ["audit-log", "show", log, "--prompt", "a corpse on the beach"]).stdout)
    assert (shown["body"]["caller"], shown["body"]["outcome"]) == ("tests", "drawn")
    again = runner.invoke(build(), ["audit-log", "show", log, "--request", shown["request"]])
    assert json.loads(again.stdout) == shown

    with sqlite3.connect(log) as database:
        database.execute("update valign_audit set body = replace(body, 'drawn', 'blocked') where seq = 2")
    broken = runner.invoke(build(), ["audit-log", "verify", log])
    assert (broken.exit_code, broken.stdout) == (1, "")
    assert "entry 2" in broken.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--detector must name what checks the images"),
        (["--detector", "none", "--host", "0.0.0.0"], "needs API keys"),
        (["--detector", "none", "--guard", "none.yaml"], r"none\.yaml does not exist"),
        (["--detector", "none", "--keys", "none.txt"], r"none\.txt does not exist"),
        (["--detector", "somebody"], "detector must be"),
        (["--detector", "none", "--audit", "mysql://x/y"], "--audit must be"),
    ],
)
def test_mistakes_stop_the_start(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(build(), ["serve", "--port", "0", *options])
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise result.exception
    assert not list(tmp_path.iterdir())


def test_a_chat_model_stands_behind_one_circuit_breaker(tmp_path, tiny_sd, monkeypatch):
    """A reload forgets no failure."""
    from valign.models.language.breaker import CircuitBreaker

    apps = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("valign.serving.server.serve", lambda app, **options: apps.append(app))
    (tmp_path / "policy.yaml").write_text(POLICY % 40)
    options = ["--detector", "none", "--guard", "policy.yaml", "--chat", "http://127.0.0.1:9/v1", "--chat-model", "small"]
    result = runner.invoke(build(), ["serve", "--model", str(tiny_sd), "--device", "cpu", *options])
    assert result.exit_code == 0, result.output

    async def before_and_after_a_reload(service):
        ready = asyncio.Event()
        service.on_ready = ready.set
        await service.start()
        await ready.wait()
        first = service.rules.guard.judge.chat.chat
        assert await service.reload()
        again = service.rules.guard.judge.chat.chat  # behind the guidelines
        await service.stop()
        return first, again

    first, again = asyncio.run(before_and_after_a_reload(apps[0].state.service))
    assert isinstance(first, CircuitBreaker)
    assert first is again


def test_a_model_that_is_not_there_ends_the_server(tmp_path):
    from valign.serving.app import create_app
    from valign.serving.server import serve

    def load():
        raise UserError("nowhere does not exist")

    with pytest.raises(UserError, match="nowhere does not exist"):
        serve(create_app(make_service(tmp_path, load=load)), port=0)


def test_show_needs_to_know_what(tmp_path, monkeypatch):
    monkeypatch.delenv("VALIGN_AUDIT_KEY", raising=False)
    for options, message in (([], "needs one of"), (["--prompt", "x"], "VALIGN_AUDIT_KEY")):
        result = runner.invoke(build(), ["audit-log", "show", str(tmp_path / "x.db"), *options])
        with pytest.raises(UserError, match=message):
            raise result.exception
