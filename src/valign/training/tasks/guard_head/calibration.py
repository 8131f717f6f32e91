"""Thresholds from false alarms: on every source of harmless prompts, at most the asked share is flagged by any column."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from valign.checks import UserError, check_range

STEPS = 40  # of the bisection
ROUNDING = 1e-6  # by which a score may differ when it is computed alone, or beside other prompts
PRESETS = {"strict": 3.0, "balanced": 1.0, "permissive": 1 / 3}  # times the asked false-alarm rate


def flagged_share(scores: Float[np.ndarray, "prompt column"], limits: Float[np.ndarray, " column"]) -> float:
    """Share of prompts with any score at or above its threshold, in [0, 1]."""
    return float((scores >= limits).any(axis=1).mean())


def calibrate(
    scores: Mapping[str, Float[np.ndarray, "prompt column"]], *, target_fpr: float | Mapping[str, float]
) -> Float[np.ndarray, " column"]:
    """The lowest thresholds, one per column, that keep every source at or below its rate.

    Columns are cut at tail shares of the harmless scores, the highest over the sources: the first column ("any") at one share, the
    others together at the same. Bisection finds the largest share for which the union of the columns stays in bounds.
    A threshold above 1 never fires.

    Args: target_fpr: In (0, 1), for all sources or by name.
    Raises: UserError without scores, or if a source has too few prompts to show such a rate (fewer than ``1 / rate``).
    """
    if not scores:
        raise UserError("calibrate.scores must hold harmless prompts, got none. Give rows of label 0.")
    rates = {name: target_fpr if isinstance(target_fpr, float) else target_fpr[name] for name in scores}
    for name, rate in rates.items():
        check_range(f"calibrate.target_fpr[{name}]", rate, above=0.0, high=0.5)
        if len(scores[name]) * rate < 1 - 1e-9:
            raise UserError(
                f"calibrate.scores[{name}] must hold at least {int(np.ceil(1 / rate))} harmless prompts for a rate of {rate:g}, "
                f"got {len(scores[name])}. Add prompts, or leave the source out."
            )

    def limits(relative: float) -> Float[np.ndarray, " column"]:
        each = [_cut(scores[name], relative * rate) for name, rate in rates.items()]
        found: Float[np.ndarray, " column"] = np.max(each, axis=0)
        return found

    low, high = 0.0, 1.0  # of the tail share, relative to the rates
    for _ in range(STEPS):
        middle = (low + high) / 2
        if all(flagged_share(scores[name], limits(middle)) <= rate for name, rate in rates.items()):
            low = middle
        else:
            high = middle
    return limits(low)


def _cut(scores: Float[np.ndarray, "prompt column"], share: float) -> Float[np.ndarray, " column"]:
    """Above the score that the allowed number of prompts exceed, per column."""
    count, columns = scores.shape
    shares = np.full(columns, share / max(columns - 1, 1))
    shares[0] = share
    allowed = np.minimum((shares * count).astype(int), count - 1)
    ranked = np.sort(scores, axis=0)[::-1]
    cut: Float[np.ndarray, " column"] = ranked[allowed, np.arange(columns)].astype(np.float64) + ROUNDING
    return cut


def presets(
    scores: Mapping[str, Float[np.ndarray, "prompt column"]], columns: tuple[str, ...], *, target_fpr: float | Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """`calibrate` for the three strictnesses, by column name; a source too small for a rate is taken at 1 / its size."""
    found = {}
    for name, factor in PRESETS.items():
        rates = {
            source: min(0.5, max(factor * (target_fpr if isinstance(target_fpr, float) else target_fpr[source]), 1 / len(rows)))
            for source, rows in scores.items()
        }
        found[name] = {column: float(limit) for column, limit in zip(columns, calibrate(scores, target_fpr=rates))}
    return found
