"""Policy files: read, lay over what they extend, check, and say of every mistake where it stands."""

from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import ValidationError

from valign.checks import UserError
from valign.policy.block_rules import softens
from valign.policy.merge import drop_ids, duplicate_ids, merge_nodes, without
from valign.policy.schema import BlockRule, Policy
from valign.policy.sentences import sentence
from valign.policy.yaml_lines import Problem, get, kind, places, plain, read_node, where

BUNDLED = ("default", "shapes", "german", "chat")


class PolicyError(UserError):
    """Everything that is wrong with a policy, one line each."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(problems, key=lambda problem: problem.where)
        super().__init__("\n".join(map(str, self.problems)))


def load_policy(name_or_path: str | Path) -> Policy:
    """Read ``"default"``, ``"shapes"`` or a file, with everything that it extends.

    Raises: PolicyError with one line ``FILE:LINE: what`` for each problem, in one go.
    """
    path = find_policy(name_or_path)
    node, problems = _resolve(path, ())
    if node is None:
        raise PolicyError(problems)
    data, at = plain(node), dict(places(node))
    try:
        policy = Policy.model_validate(data)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            place, text = sentence(detail, data)
            problems.append(Problem(at[place], text))
        raise PolicyError(problems) from None
    if problems:
        raise PolicyError(problems)
    return policy


def find_policy(name_or_path: str | Path, *, beside: Path | None = None) -> Path:
    """The file of a bundled name or of a path (relative to the folder ``beside``). Raises: UserError if there is none."""
    if str(name_or_path) in BUNDLED:
        return Path(__file__).parent / f"{name_or_path}.yaml"
    path = (beside or Path()) / Path(name_or_path).expanduser()
    if not path.exists():
        raise UserError(f"policy {path} does not exist. Give a YAML file, or one of {', '.join(BUNDLED)}.")
    if path.is_dir():
        raise UserError(f"policy {path} must be a YAML file, got a folder.")
    return path


def _resolve(path: Path, chain: tuple[Path, ...]) -> tuple[yaml.MappingNode | None, list[Problem]]:
    """The document laid over what it extends; ``chain`` holds the files that led here."""
    node, problems = read_node(path, path.name if path.parent == Path(__file__).parent else str(path))
    if node is None:
        return None, problems
    problems += duplicate_ids(node)
    removed, parent = get(node, "remove"), get(node, "extends")
    node = without(node, ("remove",))
    if parent is None or parent.value in ("", "null", "~"):
        if removed is not None:
            problems.append(Problem(where(removed), "remove needs `extends`: there is nothing to remove from."))
        return node, problems
    base, more = _base(parent, path, chain)
    problems += more
    if base is None:
        return (None if problems else node), problems
    base = without(base, ("id", "title", "extends"))  # each policy has a name of its own
    rules = _block_rules(base)
    if removed is not None:
        problems += drop_ids(base, removed)
    merged = merge_nodes(base, node)
    assert isinstance(merged, yaml.MappingNode)
    if not problems:
        problems += duplicate_ids(merged)
        problems += _softened(rules, _block_rules(merged), removed or get(node, "always_block") or node)
    return merged, problems


def _block_rules(node: yaml.MappingNode) -> dict[str, tuple[BlockRule, yaml.Node]]:
    """The block rules of a document by id; none if one is not valid, which the schema says better."""
    listed = get(node, "always_block")
    if not isinstance(listed, yaml.SequenceNode):
        return {}
    try:
        found = [(BlockRule.model_validate(plain(item)), item) for item in listed.value]
    except ValidationError:
        return {}
    return {rule.id: (rule, item) for rule, item in found}


def _softened(
    base: dict[str, tuple[BlockRule, yaml.Node]], own: dict[str, tuple[BlockRule, yaml.Node]], place: yaml.Node
) -> Iterator[Problem]:
    """Block rules of the base that are gone, or block less: no policy that extends another may switch them off."""
    for name, (rule, _) in base.items():
        kept = own.get(name)
        if kept is None:
            yield Problem(where(place), f"always_block: {name!r} cannot be removed. Add rules of your own, or extend nothing.")
        elif softens(kept[0], rule):
            text = f"always_block: {name!r} must block all that it blocks in what is extended. Add words, remove none."
            yield Problem(where(kept[1]), text)


def _base(parent: yaml.Node, path: Path, chain: tuple[Path, ...]) -> tuple[yaml.MappingNode | None, list[Problem]]:
    if not isinstance(parent, yaml.ScalarNode):
        return None, [Problem(where(parent), f"extends must be one of {', '.join(BUNDLED)} or a file's path, got {kind(parent)}.")]
    try:
        found = find_policy(parent.value, beside=path.parent)
    except UserError as error:
        return None, [Problem(where(parent), f"extends: {error}")]
    chain = (*chain, path.resolve())
    if found.resolve() in chain:
        circle = " -> ".join(file.name for file in (*chain[chain.index(found.resolve()) :], found))
        return None, [Problem(where(parent), f"extends goes round in a circle: {circle}. Let one of them extend `default`.")]
    return _resolve(found, chain)
