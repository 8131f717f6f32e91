import gzip

import pytest

from valign.checks import UserError
from valign.data.prompts.tables import read_table


def test_csv_keeps_quoted_commas_line_breaks_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffprompt,label\r\n"one, two\nthree",1\r\n'.encode())
    assert read_table(path) == [{"prompt": "one, two\nthree", "label": "1"}]


def test_json_lines_may_hold_unicode_line_separators(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "one\u2028two"}\n\n', encoding="utf-8")
    assert read_table(path) == [{"prompt": "one\u2028two"}]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1 must be a JSON object, got list"),
        ("a.jsonl", b"", "must hold at least one row"),
        ("a.jsonl", b'{"a": "\xff"}\n', "is not UTF-8 text"),
        ("a.jsonl.gz", b"not packed", "is not UTF-8 text"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0)[:-9], "is not UTF-8 text"),
        ("a.csv", b"a,b\n1,2,3\n", r"a\.csv:2 must have 2 columns"),
        ("a.csv", b'a,b\n"1,2\n', r"a\.csv, after line 1, is not readable as csv"),
        ("a.parquet", b"not parquet", "is not a parquet file"),
        ("a.pkl", b"", r"must end in \.csv, \.tsv, \.jsonl, \.parquet"),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_table(path)


def test_a_folder_and_a_missing_file_are_no_tables(tmp_path):
    with pytest.raises(UserError, match="got a folder"):
        read_table(tmp_path)
    with pytest.raises(UserError, match="got nothing there"):
        read_table(tmp_path / "x.csv")
