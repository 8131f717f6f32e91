"""Tables of labelled texts: nothing is in both parts, draws are by name, and every bad row is named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valign.checks import UserError
from valign.data.tasks.base import chosen, split
from valign.data.tasks.texts import GLUE, TextRow, TextTask, named_task, read_data, read_rows

TASK = TextTask(name="own", kind="classification", texts=("text",), target="label")
rows_of_text = st.lists(st.text("abc", min_size=1, max_size=3).map(lambda text: TextRow((text,), "x")), max_size=30)


def table(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled(count):
    return [{"text": f"line {index}", "label": index % 2} for index in range(count)]


@given(rows_of_text, st.floats(0.01, 0.5))
def test_split_keeps_equal_texts_together_and_loses_none(rows, share):
    kept, held_out = split(rows, share)
    assert sorted(map(repr, kept + held_out)) == sorted(map(repr, rows))
    assert not {row.texts for row in kept} & {row.texts for row in held_out}


@given(rows_of_text, st.floats(0.01, 0.5))
def test_no_side_is_empty_where_there_are_two_inputs(rows, share):
    kept, held_out = split(rows, share)
    assert (bool(kept) and bool(held_out)) == (len({row.texts for row in rows}) > 1)


@given(rows_of_text, st.integers(1, 30), st.integers(0, 3))
def test_fewer_rows_are_the_first_of_more(rows, count, seed):
    assert chosen(rows, count, seed) == chosen(rows, None, seed)[:count]
    assert sorted(map(repr, chosen(rows, None, seed))) == sorted(map(repr, rows))


def test_another_seed_draws_other_training_rows_and_the_same_held_out_ones(tmp_path):
    path = table(tmp_path / "rows.jsonl", labelled(200))
    first, second = (read_data(TASK, path, train_rows=40, held_out_rows=10, seed=seed) for seed in (0, 1))
    assert first.held_out == second.held_out
    assert set(first.train) != set(second.train)
    assert first.fingerprint() != second.fingerprint() != ""
    assert read_data(TASK, path, train_rows=40, held_out_rows=10, seed=0).fingerprint() == first.fingerprint()


def test_a_row_of_the_held_out_file_is_never_trained_on(tmp_path):
    train = table(tmp_path / "train.jsonl", labelled(20))
    dev = table(tmp_path / "dev.jsonl", labelled(5))
    found = read_data(TASK, tmp_path)
    assert len(found.held_out) == 5
    assert {row.texts for row in found.train} == {(f"line {index}",) for index in range(5, 20)}
    assert read_data(TASK, train, dev) == found


def test_glue_folders_are_found_below_the_data_and_directly(tmp_path):
    folder = tmp_path / "glue_rte"
    folder.mkdir()
    table(folder / "train.jsonl", [{"sentence1": "a", "sentence2": "b", "label": "entailment"}])
    assert named_task("rte", tmp_path) == named_task("rte", folder) == (GLUE["rte"], folder)
    with pytest.raises(UserError, match=r"must hold glue_cola/train\.jsonl for task cola, got nothing there\. Check --data"):
        named_task("cola", tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 1}, r"row 2 must have the column text, got label\. Name yours: --column"),
        ({"text": "x"}, r"row 2 must have the column label, got text\."),
        ({"text": "  ", "label": 1}, r"row 2 must have a text in text, got an empty one"),
        ({"text": "x", "label": " "}, r"row 2 must have a class in label, got an empty one"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        read_rows(table(tmp_path / "rows.jsonl", [{"text": "fine", "label": 0}, row]), TASK)


@pytest.mark.parametrize("bad", ["many", "nan", "inf", [1]])
def test_a_number_that_is_none_is_named(tmp_path, bad):
    task = TextTask(name="own", kind="regression", texts=("text",), target="label")
    with pytest.raises(UserError, match=r"row 1: label must be a number, got"):
        read_rows(table(tmp_path / "rows.jsonl", [{"text": "fine", "label": bad}]), task)


def test_classes_must_be_there_to_be_learnt(tmp_path):
    train = table(tmp_path / "a.jsonl", [{"text": f"{i}", "label": 0} for i in range(9)])
    with pytest.raises(UserError, match=r"must have two classes or more for own, got 0\."):
        read_data(TASK, train, table(tmp_path / "b.jsonl", [{"text": "x", "label": 0}]))
    mixed = table(tmp_path / "c.jsonl", labelled(9))
    with pytest.raises(UserError, match=r"must have every class of the held-out rows, got none of 7\."):
        read_data(TASK, mixed, table(tmp_path / "d.jsonl", [{"text": "x", "label": 7}]))


def test_a_task_that_makes_no_sense_is_refused():
    with pytest.raises(UserError, match=r"TextTask\.target must be a column, and none for causal-lm; got 'label' for causal-lm"):
        TextTask(name="own", kind="causal-lm", texts=("text",), target="label")
    with pytest.raises(ValueError, match=r"number of TextTask\.texts must be in \[1, 2\], got 3"):
        TextTask(name="own", kind="causal-lm", texts=("a", "b", "c"))
    with pytest.raises(ValueError, match=r"TextTask\.score of regression must be one of spearman, pearson; got 'accuracy'"):
        TextTask(name="own", kind="regression", texts=("a",), target="b", score="accuracy")
