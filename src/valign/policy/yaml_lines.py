"""YAML with positions: node trees in, plain data and a line for every value out.

Nodes rather than data are merged, so that an error in a merged policy still names the file and line that wrote the value.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

Where = tuple[str, int]  # file, line from 1
NodePath = tuple[str | int, ...]  # keys and indices from the top of the document
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where there is one; it is much faster
DEEPEST = 20  # levels of nesting; a policy needs seven
TOO_DEEP = f"a policy must be nested at most {DEEPEST} levels deep."


@dataclass(frozen=True)
class Problem:
    """One thing wrong, and where."""

    where: Where
    text: str

    def __str__(self) -> str:
        return f"{self.where[0]}:{self.where[1]}: {self.text}"


class _Named(StringIO):
    """Text with the file name that error marks carry."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name


def read_node(path: Path, shown: str) -> tuple[yaml.MappingNode | None, list[Problem]]:
    """Parse one document. ``shown`` is the file's name in messages. The node is None when a problem leaves nothing to check."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return None, [
            Problem((shown, 1), f"the file must be UTF-8 text, got byte {error.object[error.start]:#04x} at {error.start}.")
        ]
    try:
        odd = list(_odd_events(text, shown))
        node = None if odd else yaml.compose(_Named(text, shown), Loader=LOADER)
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
        deep = "nesting depth" in str(problem)  # libyaml's own limit, which its scanner may meet first
        return None, [Problem((shown, mark.line + 1 if mark else 1), TOO_DEEP if deep else f"the file must be YAML: {problem}.")]
    except yaml.YAMLError as error:
        return None, [Problem((shown, 1), f"the file must be YAML: {str(error).splitlines()[0]}.")]
    if odd:
        return None, odd
    if node is None:
        return None, [Problem((shown, 1), "the file is empty. Start it with `extends: default`, an `id` and a `title`.")]
    if not isinstance(node, yaml.MappingNode):
        return None, [Problem(where(node), f"a policy must be a mapping of keys to values, got {kind(node)}.")]
    odd = list(_odd_nodes(node))
    return (None, odd) if odd else (node, list(_duplicate_keys(node)))


def where(node: yaml.Node) -> Where:
    """File and line of a node."""
    return node.start_mark.name, node.start_mark.line + 1


def kind(node: yaml.Node) -> str:
    """What a node is, in words."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"


def get(node: yaml.Node, key: str) -> yaml.Node | None:
    """The value under ``key``, or None."""
    if isinstance(node, yaml.MappingNode):
        return next((value for name, value in node.value if name.value == key), None)
    return None


def plain(node: yaml.Node) -> Any:
    """Plain Python data of a node, by the safe YAML rules."""
    return _plain(node, yaml.constructor.SafeConstructor())


def _plain(node: yaml.Node, constructor: yaml.constructor.SafeConstructor) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _plain(value, constructor) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, constructor) for item in node.value]
    try:
        return constructor.construct_object(node)
    except ValueError:  # 2025-02-31 looks like a date and is none: take it as the text it is
        return node.value


def places(node: yaml.Node, place: NodePath = ()) -> Iterator[tuple[NodePath, Where]]:
    """Where every value stands; a value under a key stands where the key does."""
    yield place, where(node)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = list(places(value, (*place, str(key.value))))
            yield inner[0][0], where(key)
            yield from inner[1:]
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from places(item, (*place, index))


def _odd_events(text: str, shown: str) -> Iterator[Problem]:
    """What must not reach the composer: nesting without end, and aliases, which may be endless too."""
    depth = 0
    for event in yaml.parse(_Named(text, shown), Loader=LOADER):
        place = (shown, event.start_mark.line + 1 if event.start_mark else 1)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            yield Problem(place, TOO_DEEP)
            return
        if isinstance(event, yaml.AliasEvent):
            yield Problem(place, f"the alias *{event.anchor} is not allowed. Write the value out.")


def _odd_nodes(node: yaml.Node) -> Iterator[Problem]:
    """What YAML allows and a policy does not need: type tags, and keys that are not words."""
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
        yield Problem(where(node), f"the type tag {node.tag} is not allowed. Write the value without it.")
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        for part in child if isinstance(child, tuple) else (child,):
            yield from _odd_nodes(part)
        if isinstance(child, tuple) and not isinstance(child[0], yaml.ScalarNode):
            yield Problem(where(child[0]), f"a key must be a word, got {kind(child[0])}.")


def _duplicate_keys(node: yaml.Node) -> Iterator[Problem]:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                yield Problem(where(key), f"key {name!r} is written twice (first on line {seen[name]}). Keep one.")
            seen.setdefault(name, where(key)[1])
            yield from _duplicate_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicate_keys(item)
