"""Which checkpoint to keep, and when further training is pointless."""

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any


@dataclass
class Selection:
    """The best step so far: least drift beyond ``max_drift`` first, then least score, so a score bought with drift never wins."""

    max_drift: float
    patience: int  # validations
    best_step: int = 0  # 0: none yet
    best_excess: float = float("inf")
    best_score: float = float("inf")
    waited: int = 0  # validations since the best

    def update(self, step: int, *, score: float, drift: float = 0.0) -> bool:
        """Add one validation (score: lower is better); return whether it is the best so far. A score must be finite to be that."""
        excess = max(0.0, drift - self.max_drift)
        better = isfinite(score) and (excess, score) < (self.best_excess, self.best_score)
        if better:
            self.best_step, self.best_excess, self.best_score, self.waited = step, excess, score, 0
        else:
            self.waited += 1
        return better

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        """JSON-able; an infinity (none yet) is null."""
        return {name: None if value == float("inf") else value for name, value in asdict(self).items()}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, float("inf") if value is None else value)
