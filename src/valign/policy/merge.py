"""Lay one policy over another: mappings key by key, lists of things with an id thing by thing, other lists as a whole."""

from collections.abc import Iterator

import yaml

from valign.checks import close_to
from valign.policy.yaml_lines import Problem, get, where

SECTIONS = ("categories", "always_block", "principles", "norms", "guidelines", "rewriters")


def merge_nodes(base: yaml.Node, over: yaml.Node) -> yaml.Node:
    """``over`` on ``base``. Marks of what ``over`` wrote stay, so that its errors are found in its file."""
    if isinstance(base, yaml.MappingNode) and isinstance(over, yaml.MappingNode):
        ours = {key.value: (key, value) for key, value in over.value}
        pairs = []
        for key, value in base.value:
            new_key, new_value = ours.pop(key.value, (key, None))
            pairs.append((new_key, value if new_value is None else merge_nodes(value, new_value)))
        return yaml.MappingNode(over.tag, pairs + list(ours.values()), over.start_mark, over.end_mark)
    if _has_ids(base) and _has_ids(over):
        theirs = {_id(item): index for index, item in enumerate(base.value)}
        items = list(base.value)
        for item in over.value:
            index = theirs.get(_id(item))
            if index is None:
                items.append(item)
            else:
                items[index] = merge_nodes(items[index], item)
        return yaml.SequenceNode(over.tag, items, over.start_mark, over.end_mark)
    return over


def without(node: yaml.MappingNode, keys: tuple[str, ...]) -> yaml.MappingNode:
    """A copy of the mapping without ``keys``."""
    pairs = [(key, value) for key, value in node.value if key.value not in keys]
    return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)


def drop_ids(node: yaml.MappingNode, removed: yaml.Node) -> list[Problem]:
    """Take the things named in the list ``removed`` out of ``node``: ``id``, or ``section/id`` where an id is used twice."""
    if not isinstance(removed, yaml.SequenceNode) or not all(isinstance(entry, yaml.ScalarNode) for entry in removed.value):
        return [Problem(where(removed), "remove must be a list of ids, e.g. [shocking].")]
    problems = []
    for entry in removed.value:
        lists = dict(_id_lists(node))
        known = {f"{section}/{_id(item)}": (items, item) for section, items in lists.items() for item in items if _id(item)}
        hits = [name for name in known if entry.value in (name, name.rpartition("/")[2])]
        if len(hits) == 1:
            items, item = known[hits[0]]
            items.remove(item)
        elif hits:
            problems.append(Problem(where(entry), f"remove: {entry.value!r} is ambiguous. Write {' or '.join(hits)}."))
        else:
            guess = close_to(entry.value, [name.rpartition("/")[2] for name in known])
            problems.append(Problem(where(entry), f"remove: nothing here has the id {entry.value!r}.{guess}"))
    return problems


def duplicate_ids(node: yaml.MappingNode) -> Iterator[Problem]:
    """Ids used twice in one section of one document; concepts are one section over all categories."""
    seen: dict[tuple[str, str], str] = {}
    for section, items in _id_lists(node):
        for item in items:
            name, (file, line) = _id(item), where(item)
            if name is None:
                continue
            key = ("concepts" if "/" in section else section, name)
            if key in seen:
                first = seen[key]
                yield Problem((file, line), f"{key[0]}: id {name!r} is used twice (first at {first}). Rename or delete one.")
            seen.setdefault(key, f"{file}:{line}")


def _id_lists(node: yaml.MappingNode) -> Iterator[tuple[str, list[yaml.Node]]]:
    for section in SECTIONS:
        things = get(node, section)
        if not isinstance(things, yaml.SequenceNode):
            continue
        yield section, things.value
        if section == "categories":
            for category in things.value:
                concepts = get(category, "concepts")
                if isinstance(concepts, yaml.SequenceNode):
                    yield f"categories/{_id(category)}", concepts.value


def _has_ids(node: yaml.Node) -> bool:
    return isinstance(node, yaml.SequenceNode) and all(_id(item) is not None for item in node.value)


def _id(node: yaml.Node) -> str | None:
    value = get(node, "id")
    return str(value.value) if isinstance(value, yaml.ScalarNode) else None
