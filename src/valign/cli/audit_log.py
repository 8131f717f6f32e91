"""``valign audit-log``: check the service's log, and read it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from valign.checks import UserError
from valign.cli.common import err, out

if TYPE_CHECKING:
    from valign.serving.audit_chain import Link

app = typer.Typer(no_args_is_help=True, help="Verify and read the log of decisions that `valign serve` writes.")

Url = Annotated[str, Argument(help="the log: a path, or postgresql://USER@HOST/DATABASE")]
Json = Annotated[bool, Option("--json", help="one JSON object per entry, on stdout")]


@app.command("verify", epilog="example: valign audit-log verify valign-audit.db")
def verify(
    url: Url,
    head: Annotated[str, Option(help="a hash that you noted earlier; it must still be in the log")] = "",
    anchor: Annotated[Path | None, Option(help="file with the head that the service wrote; the one beside the log")] = None,
) -> None:
    """Recompute every hash of the chain. Prints entries and head: note it elsewhere. Exit code 1 if the log was tampered with."""
    from valign.cli.serve import AUDIT_KEY
    from valign.serving.audit_chain import BrokenChain
    from valign.serving.audit_chain import verify as walk
    from valign.serving.audit_store import AuditError, AuditStore, default_anchor

    try:
        store = AuditStore(url, anchor=anchor or default_anchor(url), secret=os.environ.get(AUDIT_KEY, "").encode())
        if store.lost_anchor():
            raise BrokenChain(0, "the log had an anchor, and it is gone")
        found = walk(store.links(), head=head, anchor=store.known())
    except AuditError as error:
        raise UserError(f"The audit log {error}.") from None
    except BrokenChain as error:
        err.print(Text(f"Tampered with: {error}.", style="red"))
        sys.exit(1)
    out.print(f"{found.entries} entries, head {found.head}", soft_wrap=True)


@app.command("tail", epilog="example: valign audit-log tail valign-audit.db -n 20")
def tail(url: Url, count: Annotated[int, Option("--count", "-n", min=1, help="entries")] = 10, as_json: Json = False) -> None:
    """The newest entries, one line each."""
    from valign.serving.audit_store import AuditStore

    _print(AuditStore(url).newest(count), as_json)


@app.command("show", epilog="example: valign audit-log show valign-audit.db --request req_4f91f340974e77abe7399444")
def show(
    url: Url,
    request: Annotated[str, Option(help="id of a request, from the answer's x-request-id")] = "",
    prompt: Annotated[str, Option(help="a prompt; its hash is looked for, so VALIGN_AUDIT_KEY must be the service's")] = "",
) -> None:
    """Everything that is known of one request, or of one prompt, as JSON."""
    from valign.cli.serve import AUDIT_KEY
    from valign.serving.audit_record import Recorder
    from valign.serving.audit_store import AuditStore

    if bool(request) == bool(prompt):
        raise UserError("show needs one of --request and --prompt. Choose one.")
    if prompt and not os.environ.get(AUDIT_KEY):
        raise UserError(f"--prompt needs the key of the service's hashes in {AUDIT_KEY}, got nothing. Export it.")
    wanted = Recorder(os.environ.get(AUDIT_KEY, "").encode()).hash(prompt) if prompt else ""
    _print(AuditStore(url).find(request=request, prompt=wanted), as_json=True)


def _print(links: Iterable[Link], as_json: bool) -> None:
    table = Table("seq", "at", "what", "who", "action", "stopped by", "request", box=None, header_style="bold")
    for link in links:
        body = json.loads(link.body)
        if as_json:
            typer.echo(json.dumps({**vars(link), "body": body}))
            continue
        stop = body.get("decision", body).get("stop", "")
        told = (body["kind"], body.get("caller", ""), body.get("outcome") or body.get("action", ""), stop, link.request)
        table.add_row(str(link.seq), link.at[:19], *map(Text, told))
    if not as_json:
        out.print(table)
