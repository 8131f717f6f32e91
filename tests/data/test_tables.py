import gzip
import json
import lzma

import pytest

from valign.checks import SEEDS, UserError
from valign.data.prompts.tables import TableReading, name_cell, number_cell, read_records, read_table, text_cell, whole_cell


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
        ("a.json", b"[1", r"a\.json is not JSON"),
        ("a.json", b"[1]", r"a\.json, row 1 must be a JSON object, got int"),
        ("a.csv", b"a,b,a\n1,2,3\n", "must have distinct columns, got 'a' twice"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer of Git LFS, not the file itself"),
        ("a.jsonl.xz", b"not packed", "is not UTF-8 text"),
        ("a.parquet.gz", b"", "must end in"),
        ("a.parquet", b"not parquet", "is not a parquet file"),
        ("a.pkl", b"", r"must end in \.csv, \.tsv, \.jsonl, \.json, \.parquet, \.txt"),
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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "id;prompt\n1;one, two\n"),
        ("a.csv", "id\tprompt\n1\tone, two\n"),
        ("a.csv", "id|prompt\n1|one, two\n"),
        ("a.tsv", 'id,prompt\n1,"one, two"\n'),
        ("a.csv", "sep=#\nid#prompt\n1#one, two\n"),
        ("a.csv", '"id;x",prompt\n1,"one, two"\n'),
    ],
)
def test_the_delimiter_is_read_from_the_header(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    (row,) = read_table(tmp_path / name)
    assert list(row.values()) == ["1", "one, two"]


def test_a_row_that_does_not_fit_names_the_delimiter(tmp_path):
    (tmp_path / "a.csv").write_text("id;prompt\n1;one; two\n")
    with pytest.raises(UserError, match=r"a\.csv:2 must have 2 columns, separated by semicolon\. Quote texts"):
        read_table(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("value", "said"),
    [(["a"], "a list"), ({"en": "a"}, "an object"), (5, "a number"), (True, "true or false"), (b"a", "bytes")],
)
def test_a_prompt_is_text_and_never_what_python_prints(value, said):
    with pytest.raises(UserError, match=f"prompt must be text, got {said}"):
        text_cell("prompt", value)


def test_empty_cells_are_empty_text_and_half_a_character_is_refused():
    assert [text_cell("prompt", value) for value in (None, "", float("nan"))] == ["", "", ""]
    with pytest.raises(UserError, match=r"prompt must be whole characters, got half of one at 2 \(\\ud83d\)"):
        text_cell("prompt", "a \ud83d b")


def test_ids_and_classes_may_be_whole_numbers():
    assert [name_cell("id", value) for value in ("a", 7, 7.0, True, None)] == ["a", "7", "7", "true", ""]
    for bad in (7.5, [7]):
        with pytest.raises(UserError, match="id must be text"):
            name_cell("id", bad)


def test_whole_numbers_keep_every_digit_and_their_range():
    assert whole_cell("seed", "12345678901234567891", *SEEDS) == 12345678901234567891
    assert [whole_cell("seed", value, *SEEDS) for value in (2**64 - 1, "7.0", 7.0, "-3")] == [2**64 - 1, 7, 7, -3]
    for bad in ("1e400", float("inf"), 2**64, "1_000", "7.5", 1e17, True, [1], "soon"):
        with pytest.raises(UserError, match=r"seed must be a whole number in \[-9223372036854775808, 18446744073709551615\], got"):
            whole_cell("seed", bad, *SEEDS)


def test_numbers_are_finite():
    assert [number_cell("score", value) for value in ("1.5", 2, 1e3)] == [1.5, 2.0, 1000.0]
    for bad in ("nan", float("inf"), True, "1_000", [1], None, "many", 10**400):
        with pytest.raises(UserError, match="score must be a number, got"):
            number_cell("score", bad)


ROWS = [{"prompt": "one", "seed": 1}, {"prompt": "two", "seed": 2}]


@pytest.mark.parametrize(
    "whole",
    [
        ROWS,
        {"version": 1, "data": ROWS},
        {"prompt": ["one", "two"], "seed": [1, 2]},
        {"prompt": {"0": "one", "7": "two"}, "seed": {"0": 1, "7": 2}},
        {"prompt": {"a": "one", "b": "two"}, "seed": {"a": 1, "b": 2}},
    ],
)
def test_json_of_every_form_gives_the_same_rows(tmp_path, whole):
    (tmp_path / "a.json").write_text(json.dumps(whole))
    assert read_table(tmp_path / "a.json") == ROWS


def test_rows_by_id_bare_texts_and_captions_of_images(tmp_path):
    for name, whole in {
        "keyed": {"0": {"prompt": "one"}, "x.png": {"prompt": "two"}},
        "bare": ["one", "two"],
        "coco": {"images": [{"id": 5, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 5, "caption": "one"}]},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(whole))
    assert read_table(tmp_path / "keyed.json") == [{"id": "0", "prompt": "one"}, {"id": "x.png", "prompt": "two"}]
    assert read_table(tmp_path / "bare.json") == [{"prompt": "one"}, {"prompt": "two"}]
    assert read_table(tmp_path / "coco.json") == [{"file_name": "a.jpg", "id": 1, "image_id": 5, "caption": "one"}]


def test_plain_lines_and_packed_files_are_tables(tmp_path):
    (tmp_path / "a.txt").write_text('one\n\ntwo, "three"\n')
    assert read_table(tmp_path / "a.txt") == [{"prompt": "one"}, {"prompt": 'two, "three"'}]
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(b'{"prompt": "one"}\n'))
    assert read_table(tmp_path / "a.jsonl.xz") == [{"prompt": "one"}]


def test_an_index_without_a_name_is_left_out(tmp_path):
    (tmp_path / "a.csv").write_text(",Unnamed: 0,prompt\n0,0,one\n")
    assert read_table(tmp_path / "a.csv") == [{"prompt": "one"}]


def test_quote_signs_of_partiprompts_belong_to_the_text(tmp_path):
    (tmp_path / "a.tsv").write_text('Prompt\tCategory\tChallenge\tNote\n"Stop" sign\tArts\tBasic\t\n')
    assert read_table(tmp_path / "a.tsv")[0]["Prompt"] == '"Stop" sign'


def test_columns_are_renamed_and_blanks_filled(tmp_path):
    (tmp_path / "a.csv").write_text("caption,kind\none,\ntwo,loud\n")
    reading = TableReading(columns={"prompt": "caption"}, fill={"kind": "calm", "label": 1})
    rows = [row for _, row in read_records(tmp_path / "a.csv", ["prompt"], reading)]
    assert [(row["prompt"], row["kind"], row["label"]) for row in rows] == [("one", "calm", 1), ("two", "loud", 1)]
    with pytest.raises(
        UserError, match=r"must have the column captoin, got caption, kind\. Did you mean 'caption'\? Mend --column"
    ):
        read_table(tmp_path / "a.csv", TableReading(columns={"prompt": "captoin"}))
    beside = TableReading(columns={"kind": "sort", "prompt": "caption"}, fill={"label": 1}).beside()
    assert read_table(tmp_path / "a.csv", beside)[1] == {"caption": "two", "kind": "loud", "prompt": "two"}
    both = TableReading(columns={"prompt": "ask"}, of_others={"suite": {"prompt": "caption"}})
    assert read_table(tmp_path / "a.csv", both.beside("suite"))[0]["prompt"] == "one"
    assert "prompt" not in read_table(tmp_path / "a.csv", both.beside("retain"))[0]
