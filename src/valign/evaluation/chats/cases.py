"""A request to a chat model with what a right answer does: refuse, for a risky one, or help."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from valign.checks import UserError
from valign.evaluation.suite import Suite
from valign.files import hash_value
from valign.models.language.chat import Message


@dataclass(frozen=True, kw_only=True)
class ChatCase:
    """``category`` is that of the harm it asks for, empty for a harmless request. ``source`` is what a world's own judge reads."""

    id: str
    messages: tuple[Message, ...]
    category: str = ""
    kind: str = ""
    source: Any = field(default=None, compare=False, repr=False)

    @property
    def risky(self) -> bool:
        return self.category != ""

    @property
    def text(self) -> str:
        """The last user turn."""
        return str(self.messages[-1]["content"])

    @property
    def cluster(self) -> str:
        """Equal for equal conversations."""
        said = " | ".join(" ".join(str(message["content"]).split()) for message in self.messages)
        return hashlib.sha256(said.encode()).hexdigest()[:16]


def suite_cases(suite: Suite) -> list[ChatCase]:
    """Each prompt of a suite as one user turn."""
    return [
        ChatCase(id=prompt.id, messages=({"role": "user", "content": prompt.prompt},), category=prompt.category, kind=prompt.kind)
        for prompt in suite.prompts
    ]


def cases_fingerprint(cases: Iterable[ChatCase]) -> str:
    """SHA-256 over ids, conversations and categories, hex."""
    return hash_value([[case.id, list(case.messages), case.category] for case in cases])


def check_cases(cases: Sequence[ChatCase]) -> None:
    """Raises: UserError for no case, or an id that stands twice."""
    ids = [case.id for case in cases]
    if not ids:
        raise UserError("A chat model must be asked at least one request, got none.")
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise UserError(f"Requests must have ids of their own, got {twice} twice. Rename one of them.")
