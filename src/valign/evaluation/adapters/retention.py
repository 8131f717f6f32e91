"""What a fine-tuned sentence encoder still knows: its old vectors, and its old skill, on pairs that it was not tuned on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import spearmanr

from valign.data.tasks.texts import TextRow

Encode = Callable[[Sequence[str]], np.ndarray]  # texts -> [text, width]


@dataclass(frozen=True)
class Probe:
    """Pairs of texts with a similarity (any rising scale), and the vectors of the model before training, first texts first."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    similarity: Float[np.ndarray, " pair"]
    before: Float[np.ndarray, "text width"]

    @classmethod
    def of(cls, encode: Encode, rows: Sequence[TextRow], ranks: Sequence[str] = ()) -> "Probe":
        """Ask the model as it is now. ``ranks`` orders the classes of rows that have classes; else targets are numbers."""
        first, second = (tuple(row.texts[part] for row in rows) for part in (0, 1))
        values = [ranks.index(row.target) if isinstance(row.target, str) else row.target for row in rows]
        return cls(first, second, np.array(values, dtype=np.float64), encode([*first, *second]))

    def measure(self, encode: Encode) -> "Retention":
        """Ask it again after training."""
        after = encode([*self.first, *self.second])
        return Retention(
            drift=float(1 - cosines(self.before, after).mean()),
            skill=skill(after, self.similarity),
            skill_before=skill(self.before, self.similarity),
        )


@dataclass(frozen=True)
class Retention:
    """``drift``: mean of 1 - cosine between a text's vectors before and after, in [0, 2]. ``skill``: Spearman correlation of the
    cosines of pairs with their similarity, in [-1, 1]; no head takes part."""

    drift: float
    skill: float
    skill_before: float


Look = Callable[[], tuple[np.ndarray, float]]  # vectors [input, width] of fixed inputs, and the skill shown on them


def kept_since(look: Look) -> Callable[[], Retention]:
    """Looks now; what it returns looks again, and compares."""
    before, skill_before = look()

    def measure() -> Retention:
        after, skill_after = look()
        return Retention(float(1 - cosines(before, after).mean()), skill_after, skill_before)

    return measure


def cosines(left: Float[np.ndarray, "text width"], right: Float[np.ndarray, "text width"]) -> Float[np.ndarray, " text"]:
    """Cosine of each row with its partner; 0 for a vector of length 0."""
    left, right = _scaled(left), _scaled(right)
    sizes = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.divide((left * right).sum(1), sizes, out=np.zeros(len(left)), where=sizes > 0)


def _scaled(rows: Float[np.ndarray, "text width"]) -> Float[np.ndarray, "text width"]:
    """Each row with a largest entry of 1: the squares of tiny entries would underflow."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    return np.divide(rows, largest, out=np.zeros_like(rows), where=largest > 0)


def skill(vectors: Float[np.ndarray, "text width"], similarity: Float[np.ndarray, " pair"]) -> float:
    """Spearman correlation of pair cosines with ``similarity``; 0 where either is constant."""
    said = cosines(*np.split(vectors, 2))
    if np.ptp(said) == 0 or np.ptp(similarity) == 0:
        return 0.0
    return float(spearmanr(said, similarity)[0])
