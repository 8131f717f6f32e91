"""Layouts of chat files, told by their columns: each a function from a row to ``(role, text)``, one row of the table."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from valign.checks import UserError
from valign.data.prompts.tables import is_blank, kind_of, text_cell

Turn = tuple[str, str]
Row = Mapping[str, Any]
SPEAKERS = {  # of every layout -> the role of a chat template
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class ChatLayout:
    """How a chat stands in a row."""

    name: str
    has: tuple[str, ...]  # columns by which it is told
    turns: Callable[[Row], Iterator[Turn]] | None  # None: it is not one to learn answers from, as `why` says
    why: str = ""


def listed_turns(column: str, role: str, text: str) -> Callable[[Row], Iterator[Turn]]:
    """A list of objects with a role and a text, in ``column``; a list that stands in a table of texts may be JSON."""

    def turns(row: Row) -> Iterator[Turn]:
        items = _parsed(row[column])
        if not isinstance(items, list):
            raise UserError(f"{column} must be a list of messages, got {kind_of(items)}. Mend or delete the row.")
        yield from _system(row)
        for place, item in enumerate(items, start=1):
            name = f"{column}, message {place}"
            if not isinstance(item, dict) or role not in item:
                got = f"an object of {', '.join(item)}" if isinstance(item, dict) else kind_of(item)
                raise UserError(f"{name} must be an object with {role} and {text}, got {got}. Mend or delete the row.")
            if "tool_calls" in item and is_blank(item.get(text)):
                raise UserError(f"{name} calls a tool, which is not learnt. Delete the row.")
            yield _speaker(name, item[role]), _said(f"{name}: {text}", item.get(text))

    return turns


def _system(row: Row) -> Iterator[Turn]:
    if not is_blank(row.get("system")):
        yield "system", text_cell("system", row["system"])


def _alpaca(row: Row) -> Iterator[Turn]:
    """Instruction, and on the lines below it the input where there is one; earlier turns in ``history`` as [question, answer]."""
    yield from _system(row)
    history = _parsed(row.get("history"))
    if not isinstance(history, list) and not is_blank(history):
        raise UserError(f"history must be a list of [question, answer], got {kind_of(history)}. Mend or delete the row.")
    for place, pair in enumerate(history if isinstance(history, list) else [], start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(
                f"history must be a list of [question, answer], got {kind_of(pair)} at {place}. Mend or delete the row."
            )
        yield "user", text_cell(f"history, question {place}", pair[0])
        yield "assistant", text_cell(f"history, answer {place}", pair[1])
    asked = [text_cell(column, row.get(column)) for column in ("instruction", "input")]
    yield "user", "\n".join(text for text in asked if text.strip())
    yield "assistant", text_cell("output", row["output"])


def _answered(ask: str, answer: str) -> Callable[[Row], Iterator[Turn]]:
    """Two columns: texts, or lists of messages."""

    def turns(row: Row) -> Iterator[Turn]:
        yield from _system(row)
        for column, role in ((ask, "user"), (answer, "assistant")):
            if isinstance(row[column], list):
                yield from listed_turns(column, "role", "content")({column: row[column]})
            else:
                yield role, text_cell(column, row[column])

    return turns


PREFERENCES = "compares two answers, which fine-tuning on answers does not learn. Keep the better one as messages."
STEPS = "rates the steps of answers, which fine-tuning on answers does not learn. Keep right answers as messages."
RATED = "rates answers, which fine-tuning on answers does not learn. Keep the good ones, without the column label."
CHAT_LAYOUTS = (  # the first whose columns are all there; stricter ones first
    ChatLayout("stepwise", ("prompt", "completions", "labels"), None, STEPS),
    ChatLayout("preference", ("chosen", "rejected"), None, PREFERENCES),
    ChatLayout("preference-responses", ("chosen_response", "rejected_response"), None, PREFERENCES),
    ChatLayout("rated", ("prompt", "completion", "label"), None, RATED),
    ChatLayout("prompt-completion", ("prompt", "completion"), _answered("prompt", "completion")),
    ChatLayout("messages", ("messages",), listed_turns("messages", "role", "content")),
    ChatLayout("sharegpt", ("conversations",), listed_turns("conversations", "from", "value")),
    ChatLayout("alpaca", ("instruction", "output"), _alpaca),
    ChatLayout("prompt-response", ("prompt", "response"), _answered("prompt", "response")),
    ChatLayout("question-answer", ("question", "answer"), _answered("question", "answer")),
)
FORMS = ("messages", "sharegpt", "alpaca")  # of which a row may have one only


def detect_chat_layout(columns: Collection[str]) -> ChatLayout | None:
    """The layout of a file with these columns; None if it is not one of chats.

    Raises: UserError if the columns are those of several.
    """
    found = [layout for layout in CHAT_LAYOUTS if set(layout.has) <= set(columns)]
    several = [layout.name for layout in found if layout.name in FORMS]
    if len(several) > 1 and found[0].name in FORMS:
        raise UserError(f"The columns must be of one chat layout, got {' and '.join(several)}. Delete the others' columns.")
    return found[0] if found else None


def _parsed(value: object) -> object:
    """A list that was written into a cell of text comes out of it; pyarrow's arrays are lists already."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        import json

        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _speaker(name: str, role: object) -> str:
    known = SPEAKERS.get(role.casefold()) if isinstance(role, str) else None
    if known is None:
        shown = repr(role) if isinstance(role, str) else kind_of(role)
        raise UserError(f"{name} must be of {', '.join(SPEAKERS)}, got {shown}. Tool calls and their results are not learnt.")
    return known


def _said(name: str, value: object) -> str:
    """A text, or the texts of a list of parts."""
    if not isinstance(value, list):
        return text_cell(name, value)
    return "".join(_parts(name, value))


def _parts(name: str, parts: Iterable[object]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, dict) and part.get("type", "text") == "text" and "text" in part:
            yield text_cell(name, part["text"])
        else:
            shown = part.get("type", "an object") if isinstance(part, dict) else kind_of(part)
            raise UserError(f"{name} must be text, got a part of {shown}. Images and sounds are not learnt.")
