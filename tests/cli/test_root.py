"""The door: help is quick and complete, a mistake is one red line and exit code 2."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer.main
from command_lines import parse
from typer.core import TyperGroup
from typer.testing import CliRunner

from valign.cli import root


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "valign", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | environment,
        timeout=120,
        check=False,
    )


def commands() -> Iterator[tuple[str, object]]:
    def walk(name: str, command: object) -> Iterator[tuple[str, object]]:
        if not isinstance(command, TyperGroup):
            yield name, command
            return
        context = typer.Context(command)
        for child in command.list_commands(context):
            yield from walk(f"{name} {child}".strip(), command.get_command(context, child))

    yield from walk("", typer.main.get_command(root.build()))


COMMANDS = dict(commands())


def test_every_command_of_the_table_is_there():
    assert {name.split()[0] for name in COMMANDS} == set(root.COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_an_example_of_itself(name):
    command = COMMANDS[name]
    assert command.help, f"valign {name} has no help"
    assert f"valign {name}" in (command.epilog or ""), f"valign {name} needs an epilog `example: valign {name} ...`"
    for line in (command.epilog or "").split("   "):
        if not line.endswith("..."):
            parse(line)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name):
    context = COMMANDS[name].context_class(COMMANDS[name])
    lacking = [parameter.name for parameter in COMMANDS[name].get_params(context) if not getattr(parameter, "help", None)]
    assert not lacking


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_has_more_than_a_dozen_options_of_its_own(name):
    own = [one for one in COMMANDS[name].params if getattr(one, "rich_help_panel", None) is None]
    assert len(own) <= 12, [one.name for one in own]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_shown(name):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(root.build(), [*name.split(), "--help"])
    assert (result.exit_code, f"valign {name}" in result.stdout) == (0, True)


def test_help_does_not_load_torch():
    code = "import sys; from valign.cli import root; root.build(); print('torch' in sys.modules, 'diffusers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_version_and_help():
    assert run("--version").stdout.startswith("valign 0.")
    shown = run("--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in root.COMMANDS)


def test_a_mistake_is_one_line_and_exit_code_2():
    result = run("policy", "check", "nowhere.yaml")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "policy nowhere.yaml does not exist. Give a YAML file, or one of default, shapes, german, chat.\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["guard", "answer", "--chat", "http://here/v1", "--allowed", "mild", "a cat"], "--allowed must be one of safe, minor"),
        (
            ["finetune", "--model", "minilm", "--task", "sst2", "--data", ".", "--out", "o", "--set", "rank=0"],
            "--set rank must be in",
        ),
    ],
)
def test_a_mistake_names_no_class_of_valign(arguments, said):
    result = CliRunner().invoke(root.build(), arguments)
    assert said in str(result.exception)
    assert "Options." not in str(result.exception)


def test_debug_shows_the_traceback():
    result = run("policy", "check", "nowhere.yaml", VALIGN_DEBUG="1")
    assert result.returncode != 0
    assert "Traceback" in result.stderr


def test_an_unknown_command_suggests_the_right_one():
    result = run("polcy", "check", "default")
    assert result.returncode == 2
    assert "policy" in result.stderr


def test_a_file_that_cannot_be_read_names_it(monkeypatch, capsys):
    def command(prog_name):
        raise PermissionError(13, "Permission denied", "x.yaml")

    monkeypatch.setattr(root, "build", lambda: command)
    monkeypatch.setattr(os, "environ", os.environ | {"VALIGN_DEBUG": "0"})  # a copy: main writes to it
    with pytest.raises(SystemExit) as stop:
        root.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("x.yaml: Permission denied. Check the path")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_early_hangup_does_not_end_the_server():
    code = "import sys, typer; from valign.cli import root\n"
    code += "app = typer.Typer()\n@app.command()\ndef wait(name: str):\n    print('ready', flush=True); sys.stdin.read()\n"
    code += "root.build = lambda: app\nsys.argv = ['valign', 'serve']\nroot.main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_say_how_the_run_goes_on(number):
    code = "import sys, typer; from valign.cli import root\n"
    code += "app = typer.Typer()\n@app.command()\ndef wait():\n    print('ready', flush=True); sys.stdin.read()\n"
    code += "root.build = lambda: app\nroot.main()"
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + code  # ignored in background jobs
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)  # closes its input: it ends in any case
    assert process.returncode == 130
    assert "Stopped. What was finished is kept. To go on from there, type: -c" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(("called", "said"), [("/bin/valign", "valign"), ("/site-packages/valign/__main__.py", "python -m valign")])
def test_a_run_goes_on_with_the_command_that_was_typed(called, said, monkeypatch, capsys):
    def stop(**_):
        raise SystemExit(130)

    monkeypatch.setattr(root, "build", lambda: stop)
    monkeypatch.setattr(sys, "argv", [called, "align", "-o", "my runs"])
    with pytest.raises(SystemExit):
        root.main()
    assert capsys.readouterr().err.endswith(f"type: {said} align -o 'my runs'\n")
