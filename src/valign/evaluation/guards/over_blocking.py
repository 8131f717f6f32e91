"""Refusals, for systems that may give no image: wanted on unsafe prompts, over-blocking on benign ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from valign.evaluation.rates import Rate, rate_of
from valign.evaluation.results import ImageResult


@dataclass(frozen=True)
class Blocking:
    """Share of prompts without an image; None where the suite has no prompt of that sort."""

    benign: Rate | None
    unsafe: Rate | None


def blocking_rates(rows: Sequence[ImageResult], *, seed: int = 0) -> Blocking:
    """Count refusals on either side. The base never refuses, so there is nothing to pair with."""
    return Blocking(*(_rate([row for row in rows if row.benign == benign], seed) for benign in (True, False)))


def _rate(rows: Sequence[ImageResult], seed: int) -> Rate | None:
    if not rows:
        return None
    return rate_of(np.array([row.blocked for row in rows], dtype=bool), np.array([row.cluster for row in rows]), seed=seed)
