"""Chats of every layout become one form; what is not a chat to learn from is refused by row and column."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from valign.checks import UserError
from valign.data.chats import Conversation, read_chats
from valign.data.prompts.tables import TableReading
from valign.data.tasks.base import TaskRow

ASKED = {"role": "user", "content": "two and two?"}
TOLD = {"role": "assistant", "content": "four"}
TURNS = (("user", "two and two?"), ("assistant", "four"))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, TOLD]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "two and "}, {"type": "text", "text": "two?"}]}, TOLD]},
        {"messages": json.dumps([ASKED, TOLD])},
        {"conversations": [{"from": "human", "value": "two and two?"}, {"from": "gpt", "value": "four"}]},
        {"instruction": "two and two?", "input": "", "output": "four"},
        {"prompt": "two and two?", "completion": "four"},
        {"prompt": [ASKED], "completion": [TOLD]},
        {"prompt": "two and two?", "response": "four", "id": 7},
        {"question": "two and two?", "answer": "four"},
    ],
)
def test_every_layout_becomes_the_same_turns(tmp_path, row):
    (found,) = read_chats(write(tmp_path / "a.jsonl", row))
    assert found == Conversation(TURNS)
    assert found.messages == [ASKED, TOLD]
    assert isinstance(found, TaskRow)


def test_instructions_have_inputs_histories_and_a_system_turn(tmp_path):
    row = {"instruction": "add", "input": "two, two", "output": "four", "history": [["hi", "hello"]], "system": "be short"}
    (found,) = read_chats(write(tmp_path / "a.jsonl", row))
    roles = ("system", "user", "assistant", "user", "assistant")
    assert found.turns == tuple(zip(roles, ("be short", "hi", "hello", "add\ntwo, two", "four"), strict=True))


def test_chats_in_parquet_are_lists_of_objects(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"messages": [ASKED, TOLD]}]), tmp_path / "a.parquet")
    assert read_chats(tmp_path / "a.parquet") == [Conversation(TURNS)]


def test_own_columns_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", {"ask": "two and two?", "reply": "four"})
    with pytest.raises(UserError, match=r"must have the columns of chats .*, got ask, reply\. Name yours by --column"):
        read_chats(path)
    reading = TableReading(columns={"prompt": "ask", "response": "reply"})
    assert read_chats(path, reading) == [Conversation(TURNS)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASKED]}, r"a\.jsonl, row 2 must end with an assistant's answer, got none"),
        ({"messages": [ASKED, TOLD | {"content": " "}]}, "row 2 must end with an assistant's answer, got an empty one"),
        ({"messages": []}, "row 2 must end with an assistant's answer, got none"),
        (
            {"messages": [ASKED | {"content": ""}, TOLD]},
            "row 2 must have a text in every message, got an empty one of the user at 1",
        ),
        ({"messages": "hello"}, "row 2: messages must be a list of messages, got text"),
        ({"messages": [ASKED, "four"]}, "row 2: messages, message 2 must be an object with role and content, got text"),
        ({"messages": [ASKED, TOLD | {"content": 4}]}, "row 2: messages, message 2: content must be text, got a number"),
        ({"messages": [ASKED, {"role": "critic", "content": "x"}]}, "message 2 must be of system, .*, got 'critic'"),
        ({"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [1]}]}, "message 2 calls a tool"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, TOLD]}, "content must be text, got a part of image"),
        ({"messages": [ASKED, ASKED, TOLD]}, "row 2 must alternate between user and assistant, got user, user, assistant"),
        ({"messages": [TOLD]}, "row 2 must alternate between user and assistant, got assistant"),
        ({"text": "x"}, "row 2 must have the column messages of layout messages, got text"),
    ],
)
def test_a_row_that_is_not_a_chat_is_refused_by_row_and_column(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        read_chats(write(tmp_path / "a.jsonl", {"messages": [ASKED, TOLD]}, row))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, r"a\.jsonl compares two answers"),
        ({"prompt": "a", "completion": "b", "label": True}, r"a\.jsonl rates answers"),
        ({"messages": [ASKED, TOLD], "instruction": "a", "output": "b"}, "must be of one chat layout, got messages and alpaca"),
        ({"instruction": ["a"], "output": "b"}, "row 1: instruction must be text, got a list"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, r"history must be a list of \[question, answer\], got text at 1"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        read_chats(write(tmp_path / "a.jsonl", row))
