"""Prompts that stand in training and test data alike; a test that was trained on measures memory, not safety.

728 of the 8,000 test rows of CoProV2 stand verbatim among its training prompts (arXiv 2412.10493, released files).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable


@runtime_checkable
class HasPrompt(Protocol):
    """Any record with a prompt."""

    @property
    def prompt(self) -> str: ...


Row = TypeVar("Row", bound=HasPrompt)


@dataclass(frozen=True)
class Overlap:
    """How much of a test set stands in the training set."""

    train: int  # distinct training prompts
    test: int  # test rows
    rows: int  # test rows whose prompt is a training prompt
    distinct: int  # distinct prompts among those rows

    @property
    def share(self) -> float:
        """Overlapping rows per test row, in [0, 1]; 0 for an empty test set."""
        return self.rows / self.test if self.test else 0.0


def fold(prompt: str) -> str:
    """The form in which two prompts count as the same: case and runs of white space do not matter."""
    return " ".join(prompt.casefold().split())


def measure_overlap(train: Iterable[str], test: Sequence[HasPrompt]) -> Overlap:
    """Compare after `fold`; nothing is dropped."""
    seen = {fold(prompt) for prompt in train}
    common = [folded for row in test if (folded := fold(row.prompt)) in seen]
    return Overlap(train=len(seen), test=len(test), rows=len(common), distinct=len(set(common)))


def without_overlap(train: Iterable[str], test: Sequence[Row], *, allow_overlap: bool = False) -> tuple[list[Row], Overlap]:
    """Test rows that are not training prompts, in their order, and the count of the others.

    ``allow_overlap=True`` keeps all rows (to reproduce published numbers); the count is the same.
    """
    seen = {fold(prompt) for prompt in train}
    kept = [row for row in test if allow_overlap or fold(row.prompt) not in seen]
    return kept, measure_overlap(seen, test)
