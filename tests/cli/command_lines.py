"""A command line, parsed as far as it goes without running the command."""

import re
import shlex
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import typer.main

from valign.cli.root import build


def find(words: list[str]) -> tuple[typer.core.TyperCommand, typer.Context, list[str]]:
    """The command that the words name, its context, and the words that are left."""
    command = typer.main.get_command(build())
    context = command.context_class(command, info_name="valign")
    while hasattr(command, "commands"):
        name, words = words[0], words[1:]
        command = command.get_command(context, name)
        assert command is not None, f"no command {name}"
        context = command.context_class(command, info_name=name, parent=context)
    return command, context, words


def parse(line: str) -> typer.Context:
    """The context of ``valign ...`` with every argument and option in its type.

    All that it reads is taken to exist, and nothing that it writes. Raises: what a mistake raises.
    """
    line = re.split(r"\s[|>]\s", line.partition("valign ")[2])[0]
    command, context, words = find(shlex.split(line, comments=True))
    written = {word for flag, word in pairwise(words) if flag in ("-o", "--out")}
    with patch.object(Path, "exists", lambda path: str(path) not in written):
        command.parse_args(context, words)
    return context
