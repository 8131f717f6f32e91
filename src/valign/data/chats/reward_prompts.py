"""Prompts that a chat model answers while it is reinforced, with what a reward needs to know of each -> `RewardPrompt`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valign.checks import UserError
from valign.data.chats.layouts import listed_turns
from valign.data.prompts.tables import AS_IT_IS, TableReading, is_blank, name_cell, read_table, text_cell, whole_cell
from valign.files import hash_value


@dataclass(frozen=True)
class RewardPrompt:
    """A conversation that ends with a user's turn, and its labels; None where a label is not known."""

    turns: tuple[tuple[str, str], ...]  # (role, text)
    harmful: bool | None = None  # whether it must be refused
    category: str | None = None
    demonstration: str | None = None  # the answer that a good model gives

    @property
    def messages(self) -> list[dict[str, str]]:
        """As chat templates take them."""
        return [{"role": role, "content": text} for role, text in self.turns]

    @property
    def query(self) -> str:
        """The last user turn."""
        return self.turns[-1][1]

    def with_query(self, text: str) -> list[dict[str, str]]:
        """The messages with another last turn."""
        return [*self.messages[:-1], {"role": "user", "content": text}]

    def row(self) -> dict[str, Any]:
        """JSON-able."""
        return {**vars(self), "turns": [list(turn) for turn in self.turns]}


def read_reward_prompts(path: Path, reading: TableReading = AS_IT_IS) -> list[RewardPrompt]:
    """Rows of ``prompt`` (a text, or a list of messages), and where known ``harmful`` (0 or 1), ``category``, ``demonstration``.

    Raises: UserError, with the row, for a missing or empty prompt, a chat that does not end with a user's turn, or a label that is
        not 0 or 1.
    """
    found = []
    for number, row in enumerate(read_table(path, reading), start=1):
        try:
            found.append(_prompt(row))
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from error
    return found


def prompt_turns(value: object) -> tuple[tuple[str, str], ...]:
    """Roles and texts of a cell that holds a text or messages. Raises: UserError where a user does not speak last."""
    if isinstance(value, list):
        turns = tuple(listed_turns("prompt", "role", "content")({"prompt": value}))
    else:
        turns = (("user", text_cell("prompt", value)),)
    if not turns or turns[-1][0] != "user" or not turns[-1][1].strip():
        raise UserError("prompt must be a text, or messages that end with a user's turn, got none. Mend or delete the row.")
    return turns


def _prompt(row: dict[str, Any]) -> RewardPrompt:
    turns = prompt_turns(row.get("prompt"))
    harmful = row.get("harmful")
    label = None if is_blank(harmful) else bool(whole_cell("harmful", int(harmful) if isinstance(harmful, bool) else harmful, 0, 1))
    named = name_cell("category", row.get("category")) or None
    return RewardPrompt(turns, label, named, text_cell("demonstration", row.get("demonstration")) or None)


def require(prompts: Sequence[RewardPrompt], *, needs: Sequence[str], what: str) -> None:
    """Refuse prompts that lack a label, or are too few.

    Args:
        needs: Of ``harmful``, ``category``, ``demonstration``.
        what: Who needs them.
    Raises: UserError that names the first such row.
    """
    if not prompts:
        raise UserError(f"{what} must have at least one prompt, got 0.")
    for number, prompt in enumerate(prompts, start=1):
        absent = [name for name in needs if getattr(prompt, name) is None]
        if absent:
            raise UserError(
                f"{what} must have {absent[0]} for every prompt, got none in row {number} ({prompt.query[:40]!r}). "
                "Label it, or delete the row."
            )


def fingerprint(prompts: Sequence[RewardPrompt]) -> str:
    """SHA-256 of the prompts and their labels."""
    return hash_value([prompt.row() for prompt in prompts])
