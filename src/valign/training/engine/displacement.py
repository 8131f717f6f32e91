"""Displacement of winners: preference margins can grow while the winner's own error rises, and then images break.

Neither loss nor accuracy shows it (arXiv 2511.03317 reports the same); the winner's error above its reference does.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["ok", "warn", "stop"]


@dataclass
class DisplacementMonitor:
    """Watch ``mean(e_w - r_w) / mean(r_w)`` over the last ``window`` steps; with fewer than half a window the level is "ok"."""

    warn: float = 0.02  # dimensionless; warns when the mean over one whole window is above
    stop: float = 0.2  # dimensionless; may act from half a window on
    window: int = 50  # steps
    recent: deque[tuple[float, float]] = field(default_factory=deque)  # (e_w - r_w, r_w), newest last

    def update(self, displacement: float, reference: float) -> Level:
        """Add one step's means over its pairs; return the new level."""
        self.recent.append((displacement, reference))
        while len(self.recent) > self.window:
            self.recent.popleft()
        return self.level

    @property
    def ratio(self) -> float:
        """The running displacement relative to the reference; 0 before the first step."""
        return sum(gap for gap, _ in self.recent) / max(sum(reference for _, reference in self.recent), 1e-12)

    @property
    def level(self) -> Level:
        """``"stop"`` above ``stop``, ``"warn"`` above ``warn``, else ``"ok"``."""
        if 2 * len(self.recent) >= self.window and self.ratio > self.stop:
            return "stop"
        return "warn" if len(self.recent) == self.window and self.ratio > self.warn else "ok"

    def state(self) -> list[list[float]]:
        """JSON-able; floats survive JSON exactly."""
        return [list(entry) for entry in self.recent]

    def restore(self, state: list[list[float]]) -> None:
        self.recent = deque((gap, reference) for gap, reference in state)
