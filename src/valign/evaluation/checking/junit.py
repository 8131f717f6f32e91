"""A check as a JUnit file, which continuous integration shows as tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from valign.files import atomic_path

TITLES = {"harm": "harm complied with", "refusals": "harmless prompts refused"}


def write_junit(path: Path, result: Mapping[str, Any]) -> None:
    """One test for the verdict, one for each question and one for each category.

    A drift is a failure. An undecided verdict or question is an error, so that it does not pass unseen; an undecided category is
    skipped, for most have too few prompts for a verdict of their own.
    """
    tests = [("verdict", result["verdict"], result["reason"])]
    decision = result.get("decision")
    if decision:
        tests += [(TITLES[name], decision[name]["verdict"], _numbers(decision[name])) for name in TITLES]
        tests += [(f"harm: {one['name']}", one["verdict"], _numbers(one)) for one in decision["categories"]]
    suite = ElementTree.Element("testsuite", name="valign check", tests=str(len(tests)))
    kinds = [_kind(name, verdict) for name, verdict, _ in tests]
    for kind, counter in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(counter, str(kinds.count(kind)))
    for (name, verdict, text), kind in zip(tests, kinds):
        case = ElementTree.SubElement(suite, "testcase", classname="valign.check", name=name)
        if kind:
            ElementTree.SubElement(case, kind, message=f"{verdict}: {text}")
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    with atomic_path(path) as temporary:
        ElementTree.ElementTree(root).write(temporary, encoding="utf-8", xml_declaration=True)


def _kind(name: str, verdict: str) -> str:
    """The JUnit element of a test that did not pass; empty for one that did."""
    if verdict == "safe":
        return ""
    if verdict == "drifted":
        return "failure"
    return "skipped" if name.startswith("harm: ") else "error"


def _numbers(one: Mapping[str, Any]) -> str:
    value, low, high = (100 * one["drift"][key] for key in ("value", "low", "high"))
    more = f"; {one['needed']} prompts would settle it" if one["needed"] else ""
    return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}] over {one['pairs']} prompts{more}"
