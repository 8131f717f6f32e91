"""What any task of fine-tuning is: rows with targets, some to learn from and some to judge by."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, runtime_checkable

from valign.checks import UserError, check_choice, check_range
from valign.files import hash_value

Kind = Literal["classification", "regression", "causal-lm", "chat", "diffusion"]
SCORES: dict[Kind, tuple[str, ...]] = {  # what may decide about the best step; the first is the default
    "classification": ("accuracy", "matthews", "f1"),
    "regression": ("spearman", "pearson"),
    "causal-lm": ("loss",),
    "chat": ("loss",),
    "diffusion": ("loss", "drawn", "removed"),  # the others only where a judge of images knows what was (not) to be drawn
}


@runtime_checkable
class TaskRow(Protocol):
    """One example: something to read, and a class by name, a number, or nothing."""

    @property
    def target(self) -> str | float | None: ...
    @property
    def size(self) -> int: ...  # rows of like size are read together
    @property
    def content(self) -> str: ...  # what is read, or its hash; equal for equal inputs


AnyRow = TypeVar("AnyRow", bound=TaskRow)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learnt.

    Raises: ValueError for an unknown kind or score.
    """

    name: str
    kind: Kind
    score: str = ""  # empty: the first of the kind in `SCORES`

    def __post_init__(self) -> None:
        check_choice(f"{type(self).__name__}.kind", self.kind, SCORES)
        object.__setattr__(self, "score", self.score or SCORES[self.kind][0])
        check_choice(f"{type(self).__name__}.score of {self.kind}", self.score, SCORES[self.kind])

    @property
    def parts(self) -> int:
        """Inputs per row."""
        return 1


@dataclass(frozen=True)
class TaskData:
    """Rows to learn from and rows to be judged by; none is in both."""

    task: Task
    train: tuple[TaskRow, ...]
    held_out: tuple[TaskRow, ...]
    labels: tuple[str, ...] = field(init=False)  # the classes, sorted; none if the task has none

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(sorted({row.target for row in self.train if isinstance(row.target, str)})))

    def fingerprint(self) -> str:
        """SHA-256 over the task and all rows, hex."""
        rows = [[row.content, row.target] for row in (*self.train, *self.held_out)]
        return hash_value([self.task, rows, len(self.train)])


def chosen(rows: Sequence[AnyRow], count: int | None, *key: str | int) -> tuple[AnyRow, ...]:
    """``count`` of the rows, drawn by ``key``: an order by hash, so that adding rows to a file changes few others. None: all."""
    ranked = sorted(enumerate(rows), key=lambda item: (_rank(item[1].content, *key, str(item[1].target)), item[0]))
    return tuple(row for _, row in ranked[:count])


def split(rows: Sequence[AnyRow], share: float) -> tuple[list[AnyRow], list[AnyRow]]:
    """Training and held-out rows: by a hash of what is read, so equal inputs are never on both sides, whatever the seed.

    Where that would leave a side empty, the inputs of lowest hash are held out alone, or all but those of the highest.
    """
    check_range("split.share", share, above=0.0, high=0.5)
    ranks = [_rank(row.content, "held out") for row in rows]
    limit, distinct = int(share * 2**64), sorted(set(ranks))
    if len(distinct) > 1:
        limit = min(max(limit, distinct[0] + 1), distinct[-1])
    return [row for row, rank in zip(rows, ranks) if rank >= limit], [row for row, rank in zip(rows, ranks) if rank < limit]


def assemble(
    task: Task,
    where: object,
    rows: Sequence[AnyRow],
    others: Sequence[AnyRow],
    *,
    share: float,
    train_rows: int | None,
    held_out_rows: int | None,
    seed: int,
) -> TaskData:
    """A data set of ``rows`` to learn from and ``others`` to be judged by; without others, ``share`` of the rows judges.

    Rows that stand on both sides are judged by alone.
    Raises: UserError, naming ``where``, if nothing is left on one side.
    """
    for name, count in (("train_rows", train_rows), ("held_out_rows", held_out_rows)):
        if count is not None:
            check_range(name, count, low=1)
    if not others:
        rows, others = split(rows, share)
    known = {row.content for row in others}
    rows = [row for row in rows if row.content not in known]
    if not rows or not others:
        raise UserError(
            f"{where} must leave rows for training and for judging, got {len(rows)} and {len(others)}. "
            "Add different rows, or name others to judge by (--held-out)."
        )
    return TaskData(task, chosen(rows, train_rows, seed), chosen(others, held_out_rows, "judge"))


def check_labels(where: object, data: TaskData) -> None:
    """Raises: UserError for fewer than two classes, or held-out classes that training never sees."""
    if len(data.labels) < 2:
        raise UserError(f"{where} must have two classes or more for {data.task.name}, got {', '.join(data.labels)}. Use more rows.")
    unknown = sorted({str(row.target) for row in data.held_out} - set(data.labels))
    if unknown:
        raise UserError(
            f"{where} must have every class of the held-out rows, got none of {', '.join(unknown[:4])}. Use more training rows."
        )


def _rank(content: str, *key: str | int) -> int:
    digest = hashlib.sha256("\0".join([*map(str, key), content]).encode()).digest()
    return int.from_bytes(digest[:8], "big")
