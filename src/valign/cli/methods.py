"""``valign methods``: what is implemented, from the declarations that stand next to the code."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Column, Table

from valign.cli.common import example, out
from valign.methods import Method, declared_methods


@example("valign methods --json")
def command(
    json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="as the page docs/methods.md")] = False,
) -> None:
    """List the implemented methods with their papers; --json and --markdown add the entry points."""
    methods = declared_methods()
    if json:
        from json import dumps

        typer.echo(dumps([asdict(method) for method in methods], indent=2))
    elif markdown:
        typer.echo(page(methods), nl=False)
    else:
        table = Table(Column("method", no_wrap=True), "what it is", "paper", "against it", "room")
        for method in methods:
            table.add_row(method.slug, method.title, method.paper, method.fidelity, method.room)
        out.print(table)


def page(methods: list[Method]) -> str:
    """The documentation's page: one row per method, with a link to the paper."""
    lines = [
        "# Methods",
        "",
        "Every paper's contribution is one short file that declares itself; this page is made from the declarations by",
        "`make docs-methods`, and a test holds it current. `valign methods` prints the same list.",
        "",
        "*Against the paper* says what the method's test shows: *exact*, *simplified* or a *variant*, and why.",
        "",
        "| room | method | what it is | paper | against the paper | entry point |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods:
        number = method.paper.removeprefix("arXiv ")
        paper = f"[{method.paper}](https://arxiv.org/abs/{number})" if number != method.paper else method.paper
        against = f"*{method.fidelity}*: {method.note}"
        lines.append(f"| {method.room} | `{method.slug}` | {method.title} | {paper} | {against} | `{method.entry}` |")
    return "\n".join(lines) + "\n"
