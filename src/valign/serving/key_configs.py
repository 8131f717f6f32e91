"""Safety configs of API keys: a YAML file of the site's own, read anew with policy and keys.

::

    studio: {role: studio, config: allows stage blood in theatre posters, author: A. Example}
    kids-app: {config: blocks violence; blocks shocking}

``role`` is the role of the key's owner: what a request of the key may loosen, and its standing config. Nothing that a request says
changes a role.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from valign.checks import UserError, close_to
from valign.policy import GuardConfig, Policy, read_guard_config
from valign.policy.safety_config import ANYONE, roles_of


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    role: str = ANYONE
    config: str = ""
    author: str = ""


@dataclass(frozen=True)
class KeyConfig:
    """What one key stands under."""

    role: str = ANYONE
    config: GuardConfig | None = None
    author: str = ""  # who answers for it, for the audit log

    def facts(self) -> dict[str, str]:
        """For the audit log."""
        return {"role": self.role, "config": "" if self.config is None else str(self.config), "author": self.author}


def load_key_configs(file: Path | None, policy: Policy, owners: Collection[str]) -> Mapping[str, KeyConfig]:
    """By name of the key's owner; none without a file.

    Args: owners: Names of all keys.
    Raises: UserError if the file is not such a mapping, names a key or role that does not exist, or holds a config that
        `read_guard_config` refuses.
    """
    if file is None:
        return {}
    if not file.exists():
        raise UserError(f"{file} does not exist. Write lines such as `studio: {{role: studio, config: blocks violence}}`.")
    try:
        data: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} must be YAML, got: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict):
        raise UserError(f"{file} must map names of keys to their configs, got {type(data).__name__}.")
    return {str(name): _read(file, str(name), row, policy, owners) for name, row in data.items()}


def _read(file: Path, name: str, row: Any, policy: Policy, owners: Collection[str]) -> KeyConfig:
    if name not in owners:
        listed = ", ".join(sorted(owners)) or "(none)"
        raise UserError(f"{file}: {name!r} must be the name of a key, got one of no key.{close_to(name, owners)} Keys: {listed}.")
    try:
        found = _Row.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the entry"
        raise UserError(f"{file}: {name}: {where}: {first['msg']}. Known keys: role, config, author.") from None
    if found.role != ANYONE and found.role not in roles_of(policy):
        known = ", ".join(roles_of(policy)) or "(none)"
        guess = close_to(found.role, roles_of(policy))
        raise UserError(f"{file}: {name}: role must be one of {known} (policy {policy.id}), got {found.role!r}.{guess}")
    try:
        config = read_guard_config(policy, found.config, role=found.role) if found.config else None
    except UserError as error:
        raise UserError(f"{file}: {name}: {error}") from None
    return KeyConfig(found.role, config, found.author)
