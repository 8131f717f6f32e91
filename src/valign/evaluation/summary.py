"""From rows to the numbers of the report: every rate with its interval, its correction and its paired difference from the base."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from valign.evaluation.guards.over_blocking import Blocking, blocking_rates
from valign.evaluation.images.fidelity import benign_rates, counterpart_rate, fidelity_rates, outcome_rates
from valign.evaluation.images.frechet import frechet_distance
from valign.evaluation.images.inappropriate import GroupRate, inappropriate_probability, unprompted
from valign.evaluation.images.measuring import Measured
from valign.evaluation.rates import Mean, Rate, mean_of
from valign.evaluation.results import ImageResult
from valign.evaluation.systems import System
from valign.interfaces import DetectorCard


@dataclass(frozen=True)
class Frechet:
    """FID over ``count`` benign prompts that every system answered: to the reference images and to the base's own."""

    count: int
    to_reference: float | None = None
    to_base: float | None = None


@dataclass(frozen=True)
class SystemSummary:
    """One system's numbers; None where suite or evaluators do not allow them. ``ip``, ``kept`` and
    ``counterpart`` are over unsafe prompts, the others over benign ones."""

    name: str
    description: str
    listed: bool  # its held-out figures are of words that a list of its own names
    extra_evaluations: float
    seconds_per_image: float | None
    ip: list[GroupRate]
    unprompted: Rate | None
    fidelity: dict[str, Rate]
    benign_right: dict[str, Rate]  # benign prompts with everything right, by kind; of held-out concepts apart
    kept: dict[str, Rate]  # the harmless rest of unsafe prompts: "details kept" is its ``everything asked``
    counterpart: Rate | None  # unsafe prompts whose image shows the safe counterpart
    outcomes: dict[str, Rate]  # unsafe prompts with a counterpart: helpful, harmful, neither
    blocking: Blocking
    drift: Mean | None
    rmse: Mean | None
    clip_score: Mean | None
    frechet: Frechet | None


def summarize(
    systems: Sequence[System],
    measured: Mapping[str, Measured],
    card: DetectorCard,
    *,
    seconds: Mapping[str, float | None],
    categories: Collection[str] | None = None,
    reference: Float[np.ndarray, "image dim"] | None = None,
    seed: int = 0,
) -> list[SystemSummary]:
    """One summary per system; the first system is the base of every comparison.

    Args: categories: Those that count; cells of `SystemSummary.ip` are all that there is of others. None for all.
    """
    base = measured[systems[0].name]
    apart = counted(base.rows, categories)
    distances = _distances(systems, measured, reference)
    found = []
    for position, system in enumerate(systems):
        every, rows = measured[system.name].rows, counted(measured[system.name].rows, categories)
        before = apart if position else None
        found.append(
            SystemSummary(
                name=system.name,
                description=system.description,
                listed=system.listed,
                extra_evaluations=system.extra_evaluations,
                seconds_per_image=seconds.get(system.name),
                ip=inappropriate_probability(every, card, base=base.rows if position else None, categories=categories, seed=seed),
                unprompted=unprompted(rows, card, base=before, seed=seed),
                fidelity=fidelity_rates(rows, base=before, seed=seed),
                benign_right=benign_rates(rows, base=before, seed=seed),
                kept=fidelity_rates(rows, base=before, benign=False, seed=seed),
                counterpart=counterpart_rate(rows, base=before, seed=seed),
                outcomes=outcome_rates(rows, base=before, seed=seed),
                blocking=blocking_rates(rows, seed=seed),
                drift=_mean(rows, "drift", None, seed) if position else None,
                rmse=_mean(rows, "rmse", None, seed) if position else None,
                clip_score=_mean(rows, "clip", before, seed),
                frechet=distances.get(system.name),
            )
        )
    return found


def counted(rows: Sequence[ImageResult], categories: Collection[str] | None) -> list[ImageResult]:
    """The rows of benign prompts and of these categories; all rows for None."""
    return [row for row in rows if row.benign or categories is None or row.category in categories]


def _mean(rows: Sequence[ImageResult], name: str, base: Sequence[ImageResult] | None, seed: int) -> Mean | None:
    """Mean of a measure over the benign prompts where it is known, on both sides if there are two."""
    chosen = [i for i, row in enumerate(rows) if row.benign and getattr(row, name) is not None]
    if base is not None:
        chosen = [i for i in chosen if getattr(base[i], name) is not None]
    if not chosen:
        return None
    values = np.array([getattr(rows[i], name) for i in chosen], dtype=np.float64)
    before = None if base is None else np.array([getattr(base[i], name) for i in chosen], dtype=np.float64)
    return mean_of(values, np.array([rows[i].cluster for i in chosen]), base=before, seed=seed)


def _distances(
    systems: Sequence[System], measured: Mapping[str, Measured], reference: Float[np.ndarray, "image dim"] | None
) -> dict[str, Frechet]:
    """FID of every system over the same prompts, so that all sets have one size."""
    answered = [row.id for row in measured[systems[0].name].rows]
    common = [prompt_id for prompt_id in answered if all(prompt_id in measured[system.name].features for system in systems)]
    if len(common) < 2:
        return {}
    features = {system.name: np.stack([measured[system.name].features[prompt_id] for prompt_id in common]) for system in systems}
    count = len(common) if reference is None else min(len(common), len(reference))
    found = {}
    for position, system in enumerate(systems):
        own = features[system.name]
        to_reference = frechet_distance(reference[:count], own[:count]) if reference is not None and count >= 2 else None
        to_base = frechet_distance(features[systems[0].name], own) if position else None
        found[system.name] = Frechet(count if reference is not None else len(common), to_reference, to_base)
    return found
