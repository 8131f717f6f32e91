"""What every command has: ``--quiet`` and ``-v`` (how much is told on stderr), and names and paths that are checked early."""

from __future__ import annotations

import logging
import os
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand

from valign.checks import UserError
from valign.cli.common import PANEL, err
from valign.cli.early import named_places, own_paths, refuse_values
from valign.cli.options import Configured, in_command_words, parameters

QUIET = "VALIGN_PROGRESS"  # the variable that silences progress, for processes that are started as well


class EveryCommand(TyperCommand):
    """A command with both options, whatever others it has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(parameters({"quiet": (_QUIET, False), "verbose": (_VERBOSE, False)}))

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if not (isinstance(self, Configured) or extra.get("resilient_parsing") or {"--help", "-h"} & set(args)):
            refuse_values(args, own_paths(self), {}, checks=named_places(self))
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """A mistake names no class and no function of valign."""
        try:
            return super().invoke(ctx)
        except ValueError as error:
            told = in_command_words(str(error), self)
            if told == str(error):
                raise
            raise UserError(told) from error


def complete(app: typer.Typer) -> None:
    """Give every command of the app, and of the groups in it, what every command has. Once is enough."""
    for command in app.registered_commands:
        own = command.cls or TyperCommand
        if not issubclass(own, EveryCommand):
            command.cls = cast("type[TyperCommand]", type(own.__name__, (EveryCommand, own), {}))
    for group in app.registered_groups:
        if group.typer_instance is not None:
            complete(group.typer_instance)


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
