"""Labelled texts for fine-tuning: what a task is, the GLUE tasks by name, and rows from any table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valign.checks import UserError, check_range
from valign.data.prompts.tables import (
    AS_IT_IS,
    TableReading,
    find_table,
    name_cell,
    number_cell,
    read_records,
    tables_named,
    text_cell,
)
from valign.data.tasks.base import Task, TaskData, assemble, check_labels

HELD_OUT = ("dev", "validation", "test")  # names of the second file in a task's folder, in this order


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """Which columns are read and what is learnt from them.

    Raises: as `Task`; ValueError for no or too many text columns, or a target where none is (or one is missing).
    """

    texts: tuple[str, ...]  # one column, or two: a pair of texts; for causal-lm a prompt that is only read, and the answer
    target: str = ""  # column of the class or the number; none for causal-lm
    folder: str = ""  # of a named task, inside the data folder

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("number of TextTask.texts", len(self.texts), low=1, high=2)
        if bool(self.target) != (self.kind != "causal-lm"):
            raise UserError(f"TextTask.target must be a column, and none for causal-lm; got {self.target!r} for {self.kind}.")

    @property
    def parts(self) -> int:
        return len(self.texts)


GLUE = {
    "cola": TextTask(name="cola", kind="classification", texts=("sentence",), target="label", score="matthews", folder="glue_cola"),
    "sst2": TextTask(name="sst2", kind="classification", texts=("sentence",), target="label", folder="glue_sst2"),
    "mrpc": TextTask(name="mrpc", kind="classification", texts=("sentence1", "sentence2"), target="label", folder="glue_mrpc"),
    "rte": TextTask(name="rte", kind="classification", texts=("sentence1", "sentence2"), target="label", folder="glue_rte"),
    "stsb": TextTask(name="stsb", kind="regression", texts=("sentence1", "sentence2"), target="score", folder="glue_stsb"),
}


@dataclass(frozen=True)
class TextRow:
    """Its texts, and a class by name, a number, or nothing."""

    texts: tuple[str, ...]
    target: str | float | None = None

    @property
    def size(self) -> int:
        return sum(map(len, self.texts))

    @property
    def content(self) -> str:
        return "\0".join(self.texts)


def read_rows(path: Path, task: TextTask, reading: TableReading = AS_IT_IS) -> list[TextRow]:
    """Every row of a csv, tsv, jsonl or parquet file.

    Raises: UserError, with the row, for a missing column, an empty text, a class that is empty or a number that is none.
    """
    rows = []
    for where, record in read_records(path, [column for column in (*task.texts, task.target) if column], reading):
        texts = tuple(text_cell(f"{where}: {column}", record[column]) for column in task.texts)
        if not all(text.strip() for text in texts):
            raise UserError(f"{where} must have a text in {' and '.join(task.texts)}, got an empty one. Mend or delete the row.")
        rows.append(TextRow(texts, _target(record[task.target], task, where) if task.target else None))
    return rows


def _target(value: Any, task: TextTask, where: str) -> str | float:
    if task.kind == "classification":
        name = name_cell(f"{where}: {task.target}", value)
        if not name.strip():
            raise UserError(f"{where} must have a class in {task.target}, got an empty one. Mend or delete the row.")
        return name
    return number_cell(f"{where}: {task.target}", value)


def read_data(
    task: TextTask,
    train: Path,
    held_out: Path | None = None,
    *,
    share: float = 0.1,
    train_rows: int | None = None,
    held_out_rows: int | None = None,
    seed: int = 0,
    reading: TableReading = AS_IT_IS,
) -> TaskData:
    """A data set of files, checked as a whole.

    Args:
        train: A table, or a folder with ``train`` and one of ``dev``, ``validation`` or ``test`` in it.
        held_out: The other table; without one, ``share`` of the rows is kept out of training.
        train_rows, held_out_rows: How many rows of each are used; None is all. ``seed`` draws the training rows; the held-out ones
            are the same for every seed.
    Raises: UserError as `read_rows`; for rows in both files, fewer than two classes, classes that training never sees, or no rows.
    """
    if train.is_dir():
        train, held_out = find_table(train, ("train",)), held_out or find_table(train, HELD_OUT)
    rows, others = (read_rows(place, task, reading) if place else [] for place in (train, held_out))
    found = assemble(task, train, rows, others, share=share, train_rows=train_rows, held_out_rows=held_out_rows, seed=seed)
    if task.kind == "classification":
        check_labels(train, found)
    elif task.kind == "regression" and len({row.target for row in found.train}) < 2:
        raise UserError(f"{train} must have different numbers in {task.target}, got one for all {len(found.train)} rows.")
    return found


def named_task(name: str, folder: Path) -> tuple[TextTask, Path]:
    """A task of `GLUE` and its folder below ``folder`` (``folder`` itself, if it is that).

    Raises: UserError if it is not there.
    """
    task = GLUE[name]
    for place in (folder / task.folder, folder):
        if tables_named(place, "train"):
            return task, place
    raise UserError(f"{folder} must hold {task.folder}/train.jsonl for task {name}, got nothing there. Check --data.")
