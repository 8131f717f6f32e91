"""Labelled texts for fine-tuning: what a task is, the GLUE tasks by name, and rows from any table."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from valign.checks import UserError, check_choice, check_range
from valign.data.tables import SUFFIXES, read_table
from valign.files import hash_value

Kind = Literal["classification", "regression", "causal-lm"]
SCORES: dict[Kind, tuple[str, ...]] = {  # what may decide about the best step; the first is the default
    "classification": ("accuracy", "matthews", "f1"),
    "regression": ("spearman", "pearson"),
    "causal-lm": ("loss",),
}
HELD_OUT = ("dev", "validation", "test")  # names of the second file in a task's folder, in this order


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """Which columns are read and what is learnt from them.

    Raises: ValueError for an unknown kind or score, no or too many text columns, or a target where none is (or one is missing).
    """

    name: str
    kind: Kind
    texts: tuple[str, ...]  # one column, or two: a pair of texts; for causal-lm a prompt that is only read, and the answer
    target: str = ""  # column of the class or the number; none for causal-lm
    score: str = ""  # empty: the first of the kind in `SCORES`
    folder: str = ""  # of a named task, inside the data folder

    def __post_init__(self) -> None:
        check_choice("TextTask.kind", self.kind, SCORES)
        check_range("number of TextTask.texts", len(self.texts), low=1, high=2)
        if bool(self.target) != (self.kind != "causal-lm"):
            raise UserError(f"TextTask.target must be a column, and none for causal-lm; got {self.target!r} for {self.kind}.")
        object.__setattr__(self, "score", self.score or SCORES[self.kind][0])
        check_choice(f"TextTask.score of {self.kind}", self.score, SCORES[self.kind])


GLUE = {
    task.name: task
    for task in (
        TextTask(name="cola", kind="classification", texts=("sentence",), target="label", score="matthews", folder="glue_cola"),
        TextTask(name="sst2", kind="classification", texts=("sentence",), target="label", folder="glue_sst2"),
        TextTask(name="mrpc", kind="classification", texts=("sentence1", "sentence2"), target="label", folder="glue_mrpc"),
        TextTask(name="rte", kind="classification", texts=("sentence1", "sentence2"), target="label", folder="glue_rte"),
        TextTask(name="stsb", kind="regression", texts=("sentence1", "sentence2"), target="score", folder="glue_stsb"),
    )
}


@dataclass(frozen=True)
class TextRow:
    """One example: its texts, and a class by name, a number, or nothing."""

    texts: tuple[str, ...]
    target: str | float | None = None


@dataclass(frozen=True)
class TextData:
    """Rows to learn from and rows to be judged by; none is in both."""

    task: TextTask
    train: tuple[TextRow, ...]
    held_out: tuple[TextRow, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, sorted; none if the task has none."""
        return tuple(sorted({row.target for row in self.train if isinstance(row.target, str)}))

    def fingerprint(self) -> str:
        """SHA-256 over the task and all rows, hex."""
        return hash_value([self.task, [[row.texts, row.target] for row in (*self.train, *self.held_out)], len(self.train)])


def read_rows(path: Path, task: TextTask) -> list[TextRow]:
    """Every row of a csv, tsv, jsonl or parquet file.

    Raises: UserError, with the row, for a missing column, an empty text, a class that is empty or a number that is none.
    """
    rows = []
    for number, record in enumerate(read_table(path), start=1):
        where = f"{path}, row {number}"
        absent = [column for column in (*task.texts, task.target) if column and record.get(column) is None]
        if absent:
            raise UserError(f"{where} must have the column {absent[0]}, got {', '.join(record)}. Name the columns of your file.")
        texts = tuple(str(record[column]) for column in task.texts)
        if not all(text.strip() for text in texts):
            raise UserError(f"{where} must have a text in {' and '.join(task.texts)}, got an empty one. Mend or delete the row.")
        rows.append(TextRow(texts, _target(record[task.target], task, where) if task.target else None))
    return rows


def _target(value: Any, task: TextTask, where: str) -> str | float:
    if task.kind == "classification":
        if not str(value).strip():
            raise UserError(f"{where} must have a class in {task.target}, got an empty one. Mend or delete the row.")
        return str(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not isfinite(number):
        raise UserError(f"{where} must have a number in {task.target}, got {value!r}. Mend or delete the row.")
    return number


def chosen(rows: Sequence[TextRow], count: int | None, *key: str | int) -> tuple[TextRow, ...]:
    """``count`` of the rows, drawn by ``key``: an order by hash, so that adding rows to a file changes few others. None: all."""
    ranked = sorted(enumerate(rows), key=lambda item: (_rank(item[1], *key), item[0]))
    return tuple(row for _, row in ranked[:count])


def split(rows: Sequence[TextRow], share: float) -> tuple[list[TextRow], list[TextRow]]:
    """Training and held-out rows: by a hash of the texts, so equal texts are never on both sides, whatever the seed."""
    check_range("split.share", share, above=0.0, high=0.5)
    limit = share * 2**64
    held_out = [row for row in rows if _rank(TextRow(row.texts), "held out") < limit]
    kept = [row for row in rows if _rank(TextRow(row.texts), "held out") >= limit]
    return kept, held_out


def _rank(row: TextRow, *key: str | int) -> int:
    digest = hashlib.sha256("\0".join([*map(str, key), *row.texts, str(row.target)]).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def read_data(
    task: TextTask,
    train: Path,
    held_out: Path | None = None,
    *,
    share: float = 0.1,
    train_rows: int | None = None,
    held_out_rows: int | None = None,
    seed: int = 0,
) -> TextData:
    """A data set of files, checked as a whole.

    Args:
        train: A table, or a folder with ``train`` and one of ``dev``, ``validation`` or ``test`` in it.
        held_out: The other table; without one, ``share`` of the rows is kept out of training.
        train_rows, held_out_rows: How many rows of each are used; None is all. ``seed`` draws the training rows; the held-out ones
            are the same for every seed.
    Raises: UserError as `read_rows`; for rows in both files, fewer than two classes, classes that training never sees, or no rows.
    """
    for name, count in (("train_rows", train_rows), ("held_out_rows", held_out_rows)):
        if count is not None:
            check_range(name, count, low=1)
    if train.is_dir():
        train, held_out = _file(train, ("train",)), held_out or _file(train, HELD_OUT)
    rows, others = read_rows(train, task), read_rows(held_out, task) if held_out else []
    if not others:
        rows, others = split(rows, share)
    known = {row.texts for row in others}
    rows = [row for row in rows if row.texts not in known]
    if not rows or not others:
        raise UserError(f"{train} must leave rows for training and for judging, got {len(rows)} and {len(others)}. Add rows.")
    found = TextData(task, chosen(rows, train_rows, seed), chosen(others, held_out_rows, "judge"))
    if task.kind == "classification":
        _check_labels(train, found)
    elif task.kind == "regression" and len({row.target for row in found.train}) < 2:
        raise UserError(f"{train} must have different numbers in {task.target}, got one for all {len(found.train)} rows.")
    return found


def _check_labels(path: Path, data: TextData) -> None:
    if len(data.labels) < 2:
        raise UserError(f"{path} must have two classes or more in {data.task.target}, got {', '.join(data.labels)}. Use more rows.")
    unknown = sorted({str(row.target) for row in data.held_out} - set(data.labels))
    if unknown:
        raise UserError(
            f"{path} must have every class of the held-out rows, got none of {', '.join(unknown[:4])}. Use more training rows."
        )


def named_task(name: str, folder: Path) -> tuple[TextTask, Path]:
    """A task of `GLUE` and its folder below ``folder`` (``folder`` itself, if it is that).

    Raises: UserError if it is not there.
    """
    task = GLUE[name]
    for place in (folder / task.folder, folder):
        if any(_files(place, "train")):
            return task, place
    raise UserError(f"{folder} must hold {task.folder}/train.jsonl for task {name}, got nothing there. Check --data.")


def _files(folder: Path, stem: str) -> list[Path]:
    endings = [*SUFFIXES, *(f"{suffix}.gz" for suffix in SUFFIXES if suffix != ".parquet")]
    return [folder / f"{stem}{ending}" for ending in endings if (folder / f"{stem}{ending}").is_file()]


def _file(folder: Path, stems: Sequence[str]) -> Path:
    for stem in stems:
        if found := _files(folder, stem):
            return found[0]
    wanted = " or ".join(f"{stem}.jsonl" for stem in stems)
    raise UserError(f"{folder} must hold {wanted} (or csv, tsv, parquet), got none of them. Name the files themselves.")
