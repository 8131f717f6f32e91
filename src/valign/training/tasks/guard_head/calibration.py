"""Thresholds from false alarms: on every source of harmless prompts, at most the asked share is flagged."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Float

from valign.checks import UserError, check_range

STEPS = 40  # of the bisection
ROUNDING = 1e-6  # by which a score may differ when it is computed alone, or beside other prompts
MISSED, KNOWN = 0.005, 100  # share of a category's found prompts that may fall below its low limit, set on as many at least
RESERVE = 0.25  # factor on that limit, since prompts unlike the known ones score lower
PRESETS = {"strict": 3.0, "balanced": 1.0, "permissive": 1 / 3}  # times the asked false-alarm rate


def flagged_share(scores: Float[np.ndarray, "prompt column"], limits: Float[np.ndarray, " column"]) -> float:
    """Share of prompts with any score at or above its threshold, in [0, 1]."""
    return float((scores >= limits).any(axis=1).mean())


def calibrate(
    scores: Mapping[str, Float[np.ndarray, "prompt column"]], *, target_fpr: float | Mapping[str, float]
) -> Float[np.ndarray, " column"]:
    """The lowest thresholds, one per column, that keep every source at or below its rate.

    The first column ("any") has its own: it alone decides whether a prompt is harmful (`valign.guard.head.learned`). The others,
    which decide where a policy has other categories than the head, keep the rates together: each is cut at one tail share of the
    harmless scores of all sources, so that no single odd prompt sets a limit. Bisection finds the largest share in bounds.
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
    every = np.concatenate(list(scores.values()))
    parts = (
        (slice(0, 1), lambda share: np.max([_cut(scores[name][:, :1], share * rate) for name, rate in rates.items()], axis=0)),
        (slice(1, None), lambda share: _cut(every[:, 1:], share * max(rates.values()))),
    )
    found = [_lowest(limits, {name: (scores[name][:, part], rate) for name, rate in rates.items()}) for part, limits in parts]
    return np.concatenate(found)


def _lowest(
    limits: Callable[[float], Float[np.ndarray, " column"]], sources: Mapping[str, tuple[Float[np.ndarray, "prompt column"], float]]
) -> Float[np.ndarray, " column"]:
    """``limits`` at the largest share in [0, 1] that keeps every source, ``(scores, rate)``, at or below its rate."""
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if all(flagged_share(scores, limits(middle)) <= rate for scores, rate in sources.values()):
            low = middle
        else:
            high = middle
    return limits(low)


def _cut(scores: Float[np.ndarray, "prompt column"], share: float) -> Float[np.ndarray, " column"]:
    """Above the score that the allowed number of prompts exceed, per column."""
    count = len(scores)
    ranked = np.sort(scores, axis=0)[::-1]
    cut: Float[np.ndarray, " column"] = ranked[min(int(share * count), count - 1)].astype(np.float64) + ROUNDING
    return cut


def suspicion(
    harmless: Mapping[str, Float[np.ndarray, "prompt column"]],
    unsafe: Float[np.ndarray, "unsafe column"],
    named: Bool[np.ndarray, "unsafe category"],
    limit: float,
    *,
    target_fpr: float,
) -> dict[str, list[float]]:
    """From which probability on a prompt could be of a category, for the block rules: low limits, apart from those that fire.

    ``found``: of a prompt in which a stage found something, `RESERVE` times the score that all but `MISSED` of the category's found
    prompts reach (0, so that every finding may be of it, where fewer than `KNOWN` are there). ``passed``: of a prompt in which
    nothing was found, the lowest that keeps the harmless prompts that could be of the category, found ones included, at the rate on
    every source.

    Args:
        harmless: Scores by source, large enough for the rate.
        unsafe: Scores of unsafe prompts; ``named`` says of which categories they are.
        limit: Of the first column, from which a prompt is found.
        target_fpr: Share of harmless prompts of a source that may count for one category, in (0, 0.5].
    """
    check_range("suspicion.target_fpr", target_fpr, above=0.0, high=0.5)
    found, passed = [], []
    for column in range(1, 1 + named.shape[1]):
        own = np.sort(unsafe[named[:, column - 1] & (unsafe[:, 0] >= limit), column])
        found.append(RESERVE * float(own[int(MISSED * len(own))]) if len(own) >= KNOWN else 0.0)
        passed.append(max((_passing(scores, column, found[-1], limit, target_fpr) for scores in harmless.values()), default=1.0))
    return {"found": found, "passed": passed}


def _passing(scores: Float[np.ndarray, "prompt column"], column: int, low: float, limit: float, rate: float) -> float:
    """The limit of prompts that are not found, for one source and category."""
    is_found = scores[:, 0] >= limit
    left = int(rate * len(scores)) - int((is_found & (scores[:, column] >= low)).sum())
    rest = np.sort(scores[~is_found, column])[::-1]
    return float(rest[min(max(left, 0), len(rest) - 1)]) + ROUNDING if len(rest) else low


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
