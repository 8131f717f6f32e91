"""The law of forgetting, fitted: ``L = L0 + A D^beta / N^alpha + E`` (Bethune et al., arXiv 2502.06042, without injected data).

D are fine-tuning tokens, N parameters, L - L0 the rise of the loss on what was known before. Least squares of
``log(rise - E) = log A + beta log D - alpha log N`` with E on a grid in [0, smallest rise), A > 0, alpha and beta >= 0. Nothing is
shipped: constants are the user's own.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import nnls

from valign.checks import UserError, check_range
from valign.evaluation.statistics import Interval
from valign.methods import Method

METHOD = Method(
    slug="forgetting-law",
    title="The law of forgetting: how the old loss rises with fine-tuning tokens and model size",
    paper="arXiv 2502.06042",
    room="evaluation",
    entry="valign.evaluation.driftcheck.forgetting_law:fit_forgetting_law",
    fidelity="simplified",
    note="without injected pre-training data (p = 0); least squares of logarithms, intervals by the bootstrap over runs",
)
GRID = 200  # values of E


@dataclass(frozen=True, kw_only=True)
class ForgettingLaw:
    """The constants with 95 % intervals; ``alpha`` is None where all models had one size, for then A holds its part.

    ``error``: root mean square of log(rise - E), of the fit.
    """

    amplitude: Interval
    beta: Interval
    alpha: Interval | None
    floor: Interval
    error: float
    runs: int

    def rise(self, tokens: float, parameters: float) -> float:
        """The rise of the loss that the law expects."""
        scale = 1.0 if self.alpha is None else parameters**self.alpha.value
        return self.amplitude.value * tokens**self.beta.value / scale + self.floor.value


def fit_forgetting_law(
    tokens: Float[np.ndarray, " run"],
    parameters: Float[np.ndarray, " run"],
    rise: Float[np.ndarray, " run"],
    *,
    samples: int = 500,
    seed: int = 0,
) -> ForgettingLaw:
    """Fit the law to runs.

    Args:
        tokens: Seen in fine-tuning, > 0; of at least two numbers.
        parameters: Of the models, > 0.
        rise: Of the loss on old data, > 0.
        samples: Bootstrap samples over runs, >= 100. Those in which only one number of tokens (or size, where it is fitted) is left
            cannot be fitted and are drawn again.
    Raises: UserError for fewer than 4 runs, or what is not positive and finite.
    """
    check_range("fit_forgetting_law.samples", samples, low=100)
    values = [np.asarray(one, dtype=np.float64) for one in (tokens, parameters, rise)]
    if len({len(one) for one in values}) != 1 or len(values[0]) < 4:
        raise UserError(f"The law must be fitted to at least 4 runs, got {', '.join(str(len(one)) for one in values)} values.")
    if not all(np.isfinite(one).all() and (one > 0).all() for one in values):
        raise UserError("Tokens, parameters and rises must be above 0 and finite, got others. Leave out runs that forgot nothing.")
    if len(set(values[0])) < 2:
        raise UserError("Runs must have at least two numbers of tokens, got one: its exponent cannot be told.")
    sized = len(set(values[1])) > 1
    seen, size, risen = values
    best, error = _fit(seen, size, risen, sized)
    draws = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    while len(found) < samples:
        places = draws.integers(len(values[0]), size=len(values[0]))
        if len(set(seen[places])) > 1 and (not sized or len(set(size[places])) > 1):
            found.append(_fit(seen[places], size[places], risen[places], sized)[0])
    low, high = np.quantile(np.array(found), [0.025, 0.975], axis=0)
    limits = [Interval(float(v), float(min(a, v)), float(max(b, v))) for v, a, b in zip(best, low, high)]
    return ForgettingLaw(
        amplitude=limits[0],
        beta=limits[1],
        alpha=limits[2] if sized else None,
        floor=limits[3],
        error=error,
        runs=len(values[0]),
    )


def _fit(
    tokens: Float[np.ndarray, " run"], parameters: Float[np.ndarray, " run"], rise: Float[np.ndarray, " run"], sized: bool
) -> tuple[Float[np.ndarray, " 4"], float]:
    """``(A, beta, alpha, E)`` with the least squared error of the logarithms, and its root mean."""
    columns = [np.log(tokens)] + ([-np.log(parameters)] if sized else [])
    centred = np.stack([column - column.mean() for column in columns], axis=1)
    best: tuple[float, np.ndarray] | None = None
    for floor in np.linspace(0, rise.min(), GRID, endpoint=False):
        target = np.log(rise - floor)
        slopes, residual = nnls(centred, target - target.mean())
        if best is None or residual < best[0] - 1e-12:
            level = target.mean() - sum(slope * column.mean() for slope, column in zip(slopes, columns))
            best = (float(residual), np.array([np.exp(level), slopes[0], slopes[1] if sized else 0.0, floor]))
    assert best is not None
    return best[1], best[0] / np.sqrt(len(rise))
