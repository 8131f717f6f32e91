"""How well the answers fit: one number that decides, and its company. Higher is better, but for a loss."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy.stats import pearsonr, spearmanr


def accuracy(truth: Int[np.ndarray, " row"], answer: Int[np.ndarray, " row"]) -> float:
    """Share of right classes."""
    return float((truth == answer).mean())


def matthews(truth: Int[np.ndarray, " row"], answer: Int[np.ndarray, " row"]) -> float:
    """Matthews' correlation for any number of classes (Gorodkin 2004); 0 where one class is all there is, or all that is said."""
    classes = np.union1d(truth, answer)
    said, true = ((side[:, None] == classes).astype(np.float64) for side in (answer, truth))
    both = [np.sum((left - left.mean(0)) * (right - right.mean(0))) for left, right in ((said, true), (said, said), (true, true))]
    return float(both[0] / np.sqrt(both[1] * both[2])) if both[1] and both[2] else 0.0


def f1(truth: Int[np.ndarray, " row"], answer: Int[np.ndarray, " row"]) -> float:
    """Mean over the classes of ``2 hits / (true + said)``."""
    found = []
    for one in np.union1d(truth, answer):
        hits = np.sum((truth == one) & (answer == one))
        found.append(2 * hits / (np.sum(truth == one) + np.sum(answer == one)))
    return float(np.mean(found))


def spearman(truth: Float[np.ndarray, " row"], answer: Float[np.ndarray, " row"]) -> float:
    """Rank correlation; 0 where either side is constant."""
    return _correlation(spearmanr, truth, answer)


def pearson(truth: Float[np.ndarray, " row"], answer: Float[np.ndarray, " row"]) -> float:
    """Correlation; 0 where either side is constant."""
    return _correlation(pearsonr, truth, answer)


def _correlation(
    measure: Callable[..., tuple[float, float]], truth: Shaped[np.ndarray, " row"], answer: Shaped[np.ndarray, " row"]
) -> float:
    if len(truth) < 2 or np.ptp(truth) == 0 or np.ptp(answer) == 0:
        return 0.0
    return float(measure(truth, answer)[0])


SCORE_OF = {"accuracy": accuracy, "matthews": matthews, "f1": f1, "spearman": spearman, "pearson": pearson}


def scores(names: Sequence[str], truth: Shaped[np.ndarray, " row"], answer: Shaped[np.ndarray, " row"]) -> dict[str, float]:
    """Each of these scores, by name; a loss is not among them."""
    return {name: SCORE_OF[name](truth, answer) for name in names if name in SCORE_OF}
