"""API keys, of which only SHA-256 hashes are kept. A key has 256 random bits, so a plain hash does not give it away.

A file of keys has one per line, ``NAME HASH``; ``#`` begins a remark.
"""

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from valign.checks import UserError
from valign.files import write_text

PREFIX = "va-"
MIN_LENGTH = 16  # characters of a key that a site chose itself
ANONYMOUS = "anonymous"  # name of every caller of a server without keys
LINE = re.compile(r"(?P<name>[\w.-]+)\s+(?P<hash>[0-9a-f]{64})")


@dataclass(frozen=True)
class Keys:
    """Owners' ``names`` by hash of the key. Without any, every request is let in."""

    names: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, file: Path | None = None, *, environment: str = "") -> "Keys":
        """From a file of hashes, and from keys in plain text, separated by commas or spaces, as a variable holds them.

        Raises: UserError for a line or key of another form; the message holds no key.
        """
        names = {}
        for number, key in enumerate(re.split(r"[,\s]+", environment.strip())):
            if key and len(key) < MIN_LENGTH:
                raise UserError(f"VALIGN_API_KEYS: key {number + 1} must have at least {MIN_LENGTH} characters, got {len(key)}.")
            if key:
                names[_hash(key)] = f"environment-{number + 1}"
        if file is not None:
            names |= _read(file)
            if not names:
                raise UserError(
                    f"{file} holds no key: all requests would be refused. Make one with `valign api-key NAME --keys {file}`."
                )
        return cls(names)

    def name_of(self, key: str) -> str | None:
        """Name of the key's owner, or None if the key is unknown."""
        if not self.names:
            return ANONYMOUS
        return self.names.get(_hash(key))


def gone(old: Keys, new: Keys) -> set[str]:
    """Owners of keys that were valid before and are not now; one who got another key in place of it is among them."""
    if not old.names:  # everybody was let in, by the name of nobody
        return {ANONYMOUS} if new.names else set()
    return {name for key, name in old.names.items() if new.names.get(key) != name}


def new_key(name: str, file: Path) -> str:
    """A new random key, returned and written nowhere; the file gets its hash. Raises: UserError if the name is taken."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"A key's name must be letters, digits, dots, hyphens or underscores, got {name!r}. Choose another.")
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if file.exists() and name in _read(file).values():
        raise UserError(f"{file} already has a key named {name}. Choose another name, or delete its line first.")
    key = PREFIX + secrets.token_urlsafe(32)
    write_text(file, f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}{name} {_hash(key)}\n")
    return key


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _read(file: Path) -> dict[str, str]:
    if not file.exists():
        raise UserError(f"{file} does not exist. Make it with `valign api-key NAME --keys {file}`.")
    names = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        match = LINE.fullmatch(text)
        if text and match is None:
            raise UserError(f"{file}:{number} must be NAME and a SHA-256 hash of 64 hex digits. A key itself must not stand there.")
        if match is not None:
            names[match["hash"]] = match["name"]
    return names
