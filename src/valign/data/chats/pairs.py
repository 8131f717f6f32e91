"""A file of chats with a preferred and a rejected answer each -> `ChatPair`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valign.checks import UserError
from valign.data.chats.conversation import Conversation
from valign.data.chats.layouts import Turn, listed_turns
from valign.data.chats.reading import checked_turns
from valign.data.prompts.tables import AS_IT_IS, TableReading, read_table, text_cell

ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True)
class ChatPair:
    """One conversation with two last answers: ``safe`` is to be given, ``unsafe`` is not."""

    safe: Conversation
    unsafe: Conversation


def is_pair_file(path: Path, reading: TableReading = AS_IT_IS) -> bool:
    """Whether the table has the columns of pairs."""
    return all(any(name in row for row in read_table(path, reading)) for name in ANSWERS)


def read_chat_pairs(path: Path, reading: TableReading = AS_IT_IS) -> list[ChatPair]:
    """Rows of ``prompt``, ``chosen`` and ``rejected``: texts, or lists of messages; with messages ``prompt`` may be missing.

    Raises: UserError, with the row, for a missing column, a cell of the wrong type, or answers that are the same or belong to
        different conversations.
    """
    found = []
    for number, row in enumerate(read_table(path, reading), start=1):
        where = f"{path}, row {number}"
        try:
            safe, unsafe = (_conversation(row, answer) for answer in ANSWERS)
        except UserError as error:
            raise UserError(f"{where}{'' if str(error).startswith('must') else ':'} {error}") from error
        if safe.turns[:-1] != unsafe.turns[:-1] or safe == unsafe:
            what = "the same answer twice" if safe == unsafe else "different conversations"
            raise UserError(f"{where} must have two answers to one conversation, got {what}. Mend or delete the row.")
        found.append(ChatPair(safe, unsafe))
    return found


def _conversation(row: Mapping[str, Any], answer: str) -> Conversation:
    turns: list[Turn] = []
    for name, role in (("prompt", "user"), (answer, "assistant")):
        value = row.get(name)
        if isinstance(value, list):
            turns += listed_turns(name, "role", "content")({name: value})
        elif name == answer or value is not None:
            turns.append((role, text_cell(name, value)))
    return Conversation(checked_turns(turns))
