"""The command table, and the one place where a mistake becomes a red line and an exit code."""

import os
import shlex
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from valign.cli.every_command import complete
from valign.progress import plain_console

# panel of the help -> command -> (module, attribute). A `Typer` is a group of commands, a function is one command.
PANELS = {
    "Start here": {
        "quickstart": ("valign.cli.align", "quickstart"),
        "align": ("valign.cli.align", "command"),
        "estimate": ("valign.cli.estimate", "command"),
        "doctor": ("valign.cli.doctor", "command"),
    },
    "One step at a time": {
        "policy": ("valign.cli.policy", "app"),
        "data": ("valign.cli.data", "app"),
        "train": ("valign.cli.train", "app"),
        "baseline": ("valign.cli.baseline", "app"),
        "merge": ("valign.cli.merge", "app"),
        "realign": ("valign.cli.realign", "app"),
        "adapter": ("valign.cli.adapter", "app"),
        "detector": ("valign.cli.detector", "app"),
        "evaluate": ("valign.cli.evaluate", "command"),
        "report": ("valign.cli.report", "command"),
        "attack": ("valign.cli.attack", "command"),
    },
    "Fine-tuning": {
        "finetune": ("valign.cli.finetune", "command"),
        "check": ("valign.cli.check", "command"),
        "repair": ("valign.cli.repair", "command"),
        "compare": ("valign.cli.compare", "app"),
    },
    "At inference": {
        "guard": ("valign.cli.guard", "app"),
        "guidelines": ("valign.cli.guidelines", "app"),
        "prompt": ("valign.cli.prompt", "app"),
        "generate": ("valign.cli.generate", "command"),
        "serve": ("valign.cli.serve", "command"),
        "api-key": ("valign.cli.serve", "api_key"),
        "audit-log": ("valign.cli.audit_log", "app"),
    },
    "Evidence": {
        "driftcheck": ("valign.cli.driftcheck", "app"),
        "red-eval": ("valign.cli.red_eval", "command"),
        "audit": ("valign.cli.audit", "app"),
        "bench": ("valign.cli.bench", "app"),
        "world": ("valign.cli.world", "app"),
        "methods": ("valign.cli.methods", "command"),
    },
}
ALIASES = {"driftcaps": "driftcheck"}
COMMANDS = {name: place for panel in PANELS.values() for name, place in panel.items()}


class InOrder(TyperGroup):
    """Lists commands in the order of the table; typer would put groups last."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in COMMANDS if name in self.commands]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, ALIASES.get(cmd_name, cmd_name))


def _version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"valign {version('valign')}")
        raise typer.Exit
    return wanted


def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    """Make an image model safer, and measure it: one policy, enforced in training and at inference."""


def build() -> typer.Typer:
    """The whole command tree. Command modules import torch inside their functions, so that help stays quick."""
    root = typer.Typer(
        cls=InOrder,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    root.callback(epilog="example: valign quickstart -o runs/quickstart")(_start)
    for panel, commands in PANELS.items():
        for name, (module, attribute) in commands.items():
            target = getattr(import_module(module), attribute)
            if isinstance(target, typer.Typer):
                root.add_typer(target, name=name, rich_help_panel=panel)
            else:
                root.command(name, rich_help_panel=panel, **target.options)(target)
    complete(root)
    return root


def main() -> None:
    """Run ``valign``. Exit codes: 0 well, 2 the user's mistake (``check`` has its own), 130 stopped by Ctrl-C or SIGTERM.

    ``VALIGN_DEBUG=1`` shows tracebacks.
    """
    if sys.argv[1:2] != ["serve"]:  # the server has its own way to end
        signal.signal(signal.SIGTERM, _stop)
    elif hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # one that comes before the service listens must not end it
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # their remarks are about their own internals
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        build()(prog_name="valign")
    except SystemExit as stop:
        if stop.code == 130:
            again = " ".join([_program(), shlex.join(sys.argv[1:])])
            _complain(f"Stopped. What was finished is kept. To go on from there, type: {again}")
        raise
    except (ValueError, OSError) as error:  # UserError is a ValueError
        if os.environ.get("VALIGN_DEBUG") == "1":
            raise
        _complain(_say(error))
        sys.exit(2)


def _stop(*_: object) -> None:
    """SIGTERM ends a command as Ctrl-C does."""
    raise KeyboardInterrupt


def _program() -> str:
    """How valign was called: ``valign``, or the package as a module."""
    name = Path(sys.argv[0]).name
    return "python -m valign" if name == "__main__.py" else name


def _say(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'A file'}: {error.strerror}. Check the path, its permissions and the free space."
    return str(error) or f"{type(error).__name__} without a message; VALIGN_DEBUG=1 shows where."


def _complain(text: str) -> None:
    plain_console(stderr=True).print(text, style="red", soft_wrap=True)
