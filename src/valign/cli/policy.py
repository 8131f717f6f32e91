"""``valign policy``: check a policy file, show it with everything that it extends."""

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from valign.cli.common import out
from valign.policy import Category, Policy, load_policy

app = typer.Typer(
    help="Check and show policies: the file of rules that drives data, experts, guard and reports.", no_args_is_help=True
)

File = Annotated[str, typer.Argument(metavar="FILE", help="a policy file, or one of: default, shapes")]


@app.command("check", epilog="example: valign policy check my-site.yaml")
def check(file: File) -> None:
    """Find every mistake in a policy, one line each with its file and line."""
    policy = load_policy(file)
    concepts = sum(len(category.concepts) for category in policy.categories)
    out.print(f"{file}: policy {policy.id} is right: {len(policy.categories)} categories, {concepts} concepts.", soft_wrap=True)


@app.command("show", epilog="example: valign policy show default --category violence")
def show(
    file: File = "default",
    category: Annotated[str, typer.Option(help="one category only, with its concepts")] = "",
    json: Annotated[bool, typer.Option("--json", help="the resolved policy as JSON")] = False,
) -> None:
    """Show a policy as resolved, with all that it extends."""
    policy = load_policy(file)
    if json:
        part = policy.category(category) if category else policy
        typer.echo(part.model_dump_json(indent=2))
    elif category:
        out.print(concept_table(policy.category(category)))
    else:
        out.print(policy_tree(policy))


def policy_tree(policy: Policy) -> Tree:
    """The whole policy at a glance."""
    tree = Tree(Text(f"{policy.id}: {policy.title}", style="bold"))
    table = Table("category", "action", "threshold", "concepts", "held out", box=None, header_style="dim")
    for category in policy.categories:
        held_out = sum(concept.held_out for concept in category.concepts)
        table.add_row(
            Text(category.id),
            category.action,
            f"{category.threshold:g}",
            str(len(category.concepts)),
            str(held_out),
            style=_style(category),
        )
    tree.add("categories").add(table)
    for name in ("always_block", "principles", "norms", "guidelines", "rewriters"):
        branch = tree.add(name.replace("_", " "))
        for part in getattr(policy, name):
            branch.add(Text.assemble((f"{part.id} ", "bold"), part.text))
    for name in ("cases", "thresholds"):
        values = getattr(policy, name).model_dump()
        tree.add(f"{name}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    tree.add(Text(f"safe styles: {'; '.join(policy.safe_styles)}"))
    tree.add(Text(f"negative prompt: {policy.negative_prompt}"))
    tree.add(Text(f"safety text: {policy.safety_text}"))
    tree.add(f"data: {policy.data.per_concept} prompts per concept, about {policy.data.words} words each")
    return tree


def concept_table(category: Category) -> Table:
    """A category's concepts and what is generated in their place."""
    table = Table("concept", "in a prompt", "generated instead", "held out", title=Text(f"{category.title}: {category.action}"))
    for concept in category.concepts:
        table.add_row(Text(concept.id), Text(concept.name), Text(concept.safe), "yes" if concept.held_out else "")
    return table


def _style(category: Category) -> str:
    return {"allow": "green", "rewrite": "yellow", "block": "red"}[category.action]
