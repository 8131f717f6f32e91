"""Preference pairs of prompts by the images made from them (VPO, arXiv 2503.20491): strict dominance and a score gap."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from valign.checks import check_choice, check_range


@dataclass(frozen=True, kw_only=True)
class DominancePairs:
    """Candidate a is preferred to b if it passes every check that b passes and one more, and its score is higher by over ``gap``.

    The score is the weighted sum of passed checks. ``pick``: "first" takes the first valid (a, b) in index order, as the
    authors do, "largest_gap" the one with the largest gap.
    """

    weights: tuple[float, ...] = ()  # of the checks, >= 0; none: 1 each
    gap: float = 0.5
    pick: Literal["first", "largest_gap"] = "first"

    def __post_init__(self) -> None:
        check_range("DominancePairs.gap", self.gap, low=0.0)
        check_choice("DominancePairs.pick", self.pick, ("first", "largest_gap"))
        for weight in self.weights:
            check_range("DominancePairs.weights", weight, low=0.0)

    def scores(self, passed: Bool[np.ndarray, "candidate check"]) -> Float[np.ndarray, " candidate"]:
        """Weighted sums, in [0, sum of weights]. Raises: ValueError unless there is one weight per check."""
        if not self.weights:
            return np.asarray(passed.sum(axis=1), dtype=np.float64)
        if passed.shape[1] != len(self.weights):
            raise ValueError(f"DominancePairs.weights must be one per check, got {len(self.weights)} for {passed.shape[1]} checks.")
        return np.asarray(passed @ np.asarray(self.weights))

    def __call__(self, passed: Bool[np.ndarray, "candidate check"]) -> tuple[int, int] | None:
        """Numbers of the preferred and the other candidate; None if no two qualify. Raises: ValueError for fewer than 2."""
        if len(passed) < 2:
            raise ValueError(f"DominancePairs needs 2 candidates of a query, got {len(passed)}. Sample more.")
        scores, wins = self.scores(passed), dominates(passed)
        valid = [(a, b) for a in range(len(passed)) for b in range(len(passed)) if wins[a, b] and scores[a] - scores[b] > self.gap]
        if not valid:
            return None
        return valid[0] if self.pick == "first" else max(valid, key=lambda pair: float(scores[pair[0]] - scores[pair[1]]))


def dominates(passed: Bool[np.ndarray, "candidate check"]) -> Bool[np.ndarray, "candidate candidate"]:
    """Whether row a passes all that row b passes, and more."""
    at_least = np.all(passed[:, None] >= passed[None, :], axis=2)
    return np.asarray(at_least & np.any(passed[:, None] > passed[None, :], axis=2))


def read_checks(answers: Sequence[Sequence[str]]) -> Bool[np.ndarray, "candidate check"]:
    """Answers "yes" or "no", by candidate and check, as truth values.

    Raises: ValueError for lists of unequal length, or another answer: to take it for "no" would hide a judge that is broken.
    """
    if len({len(row) for row in answers}) > 1:
        raise ValueError(f"read_checks.answers must have one length, got {sorted({len(row) for row in answers})}. Ask every check.")
    other = next((one for row in answers for one in row if one.strip().lower() not in ("yes", "no")), None)
    if other is not None:
        raise ValueError(f"read_checks.answers must be yes or no, got {other!r}. Ask again, or leave the candidate out.")
    return np.array([[one.strip().lower() == "yes" for one in row] for row in answers], dtype=bool)
