"""A file of chats -> `Conversation`, whatever its layout."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from valign.checks import UserError
from valign.data.chats.conversation import Conversation
from valign.data.chats.layouts import CHAT_LAYOUTS, Turn, detect_chat_layout
from valign.data.prompts.tables import AS_IT_IS, TableReading, read_table


def read_chats(path: Path, reading: TableReading = AS_IT_IS) -> list[Conversation]:
    """Every chat of a table, in file order.

    Raises: UserError, with the row and the column, for a file of another layout, a cell of the wrong type, an unknown speaker, a
        chat that does not alternate, or one without an answer at its end.
    """
    rows = read_table(path, reading)
    layout = detect_chat_layout({name for row in rows for name in row})
    if layout is None:
        known = "; ".join(" and ".join(one.has) for one in CHAT_LAYOUTS if one.turns)
        raise UserError(f"{path} must have the columns of chats ({known}), got {', '.join(rows[0])}. Name yours by --column.")
    if layout.turns is None:
        raise UserError(f"{path} {layout.why}")
    found = []
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        absent = [name for name in layout.has if name not in row]
        if absent:
            raise UserError(
                f"{where} must have the column {absent[0]} of layout {layout.name}, got {', '.join(row)}. Mend the row."
            )
        try:
            found.append(Conversation(checked_turns(layout.turns(row))))
        except UserError as error:
            raise UserError(f"{where}{'' if str(error).startswith('must') else ':'} {error}") from error
    return found


def checked_turns(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """Without empty system turns. Raises: UserError unless user and assistant alternate and the assistant answers last."""
    said = tuple((role, text) for role, text in turns if role != "system" or text.strip())
    roles = [role for role, _ in said]
    spoken = roles[roles[:1] == ["system"] :]
    if not spoken or spoken[-1] != "assistant":
        raise UserError("must end with an assistant's answer, got none. Add the answer, or delete the row.")
    empty = next((place for place, (_, text) in enumerate(said, start=1) if not text.strip()), None)
    if empty is not None and roles[empty - 1] == "assistant" and empty == len(said):
        raise UserError("must end with an assistant's answer, got an empty one. Add the answer, or delete the row.")
    if empty is not None:
        raise UserError(f"must have a text in every message, got an empty one of the {roles[empty - 1]} at {empty}. Mend the row.")
    if "system" in spoken or spoken[0] != "user" or any(one == other for one, other in pairwise(spoken)):
        raise UserError(f"must alternate between user and assistant, got {', '.join(roles)}. Join or delete turns.")
    return said
