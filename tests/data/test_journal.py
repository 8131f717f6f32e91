import pytest

from valign.checks import UserError
from valign.data.journal import Journal


def test_entries_come_back_and_a_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path).add({"key": "a", "n": 1}, {"key": "b", "text": "ü"})
    with path.open("ab") as file:
        file.write(b'{"key": "c", "n"')  # a kill in the middle of a write
    again = Journal(path)
    assert list(again.entries) == ["a", "b"]
    again.add({"key": "c", "n": 3})
    assert Journal(path).entries == {"a": {"key": "a", "n": 1}, "b": {"key": "b", "text": "ü"}, "c": {"key": "c", "n": 3}}


def test_a_line_that_is_no_entry_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"key": "a"}\nrubbish\n')
    with pytest.raises(UserError, match=r"journal\.jsonl:2 is not a journal entry"):
        Journal(path)
