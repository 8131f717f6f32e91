"""``valign methods`` and the page that is made from it."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from valign.cli.methods import page
from valign.cli.root import build
from valign.methods import declared_methods

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def methods():
    return declared_methods()


def test_lists_as_table_and_json(methods):
    runner = CliRunner(env={"COLUMNS": "200"})
    table = runner.invoke(build(), ["methods"])
    rows = json.loads(runner.invoke(build(), ["methods", "--json"]).stdout)
    assert [row["slug"] for row in rows] == [method.slug for method in methods]
    assert all(method.slug in table.stdout for method in methods)


def test_no_declaration_is_overlooked(methods):
    sources = (ROOT / "src/valign").rglob("*.py")
    slugs = [
        slug
        for file in sources
        for slug in re.findall(r'^METHOD = Method\(\s*slug="([^"]+)"', file.read_text("utf-8"), re.MULTILINE)
    ]
    assert sorted(slugs) == sorted(method.slug for method in methods)


def test_slugs_are_unique(methods):
    slugs = [method.slug for method in methods]
    assert len(set(slugs)) == len(slugs)


def test_every_method_says_how_it_stands_to_its_source_and_why(methods):
    silent = [m.slug for m in methods if m.fidelity not in ("exact", "simplified", "variant") or len(m.note) < 10]
    assert silent == []


def test_a_methods_page_says_the_same(methods):
    pages = {method: ROOT / "docs/methods" / f"{method.slug}.md" for method in methods}
    told = {method: page.read_text("utf-8").lower() for method, page in pages.items() if page.exists()}
    assert len(told) > 10
    assert [m.slug for m, text in told.items() if f"*{m.fidelity}*" not in text and f"a {m.fidelity}" not in text] == []


def test_entry_points_exist_and_stand_in_their_room(methods):
    from importlib import import_module

    for method in methods:
        module, _, name = method.entry.partition(":")
        assert hasattr(import_module(module), name), method
        assert module.split(".")[1] == method.room, method


def test_the_page_is_current(methods):
    written = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert written == page(methods), "docs/methods.md is not current. Run: make docs-methods"
