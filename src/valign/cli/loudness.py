"""``--quiet`` and ``-v``, which every command takes: how much is said on stderr beside results and errors."""

from __future__ import annotations

import logging
import os
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand

from valign.cli.common import PANEL, err
from valign.cli.options import parameters

QUIET = "VALIGN_PROGRESS"  # the variable that silences progress, for processes that are started as well


class Loud(TyperCommand):
    """A command with both options, whatever others it has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(parameters({"quiet": (_QUIET, False), "verbose": (_VERBOSE, False)}))


def with_loudness(app: typer.Typer) -> None:
    """Give every command of the app, and of the groups in it, the two options. Once is enough."""
    for command in app.registered_commands:
        own = command.cls or TyperCommand
        if not issubclass(own, Loud):
            command.cls = cast("type[TyperCommand]", type(own.__name__, (Loud, own), {}))
    for group in app.registered_groups:
        if group.typer_instance is not None:
            with_loudness(group.typer_instance)


def _set_quiet(quiet: bool) -> None:
    err.quiet = quiet
    if quiet:
        os.environ[QUIET] = "0"


def _set_verbose(verbose: bool) -> None:
    if verbose:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)


_QUIET = Annotated[
    bool,
    typer.Option("--quiet", help="results and errors only", callback=_set_quiet, expose_value=False, rich_help_panel=PANEL),
]
_VERBOSE = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="log messages as well", callback=_set_verbose, expose_value=False, rich_help_panel=PANEL),
]
