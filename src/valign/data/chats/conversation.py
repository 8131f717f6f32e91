"""The one form of a chat: turns with a role and a text, the last of them the assistant's answer."""

from dataclasses import dataclass
from typing import ClassVar

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """Turns of a chat as ``(role, text)``: an optional system turn, then user and assistant in turn, the assistant last.

    It is a row of a task (`valign.data.tasks.base.TaskRow`) without a target: what is learnt are its answers.
    """

    turns: tuple[tuple[str, str], ...]
    target: ClassVar[None] = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """As chat templates take them."""
        return [{"role": role, "content": text} for role, text in self.turns]

    @property
    def size(self) -> int:
        """Characters, so that chats of like length are read together."""
        return sum(len(text) for _, text in self.turns)

    @property
    def content(self) -> str:
        return "\0".join(f"{role}\1{text}" for role, text in self.turns)
