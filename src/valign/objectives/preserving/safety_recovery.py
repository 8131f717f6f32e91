"""Teach refusals that survive a harmful start of the answer (safety-recovery augmentation, arXiv 2406.05946)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from valign.checks import check_options, check_range, option
from valign.methods import Method

METHOD = Method(
    slug="safety-recovery",
    title="Safety recovery: refusals trained behind the start of a harmful answer",
    paper="arXiv 2406.05946",
    room="objectives",
    entry="valign.objectives.preserving.safety_recovery:SafetyRecovery",
    fidelity="exact",
    note="the paper's draw of the prefix and its mix of rows; other rows than the user's own benign ones are not added",
)


class RecoveryRow(NamedTuple):
    """Ids of one training row, and which of them are trained: those of the refusal alone."""

    ids: list[int]
    trained: list[bool]
    prefix: int  # tokens of the harmful answer that stand before the refusal


@dataclass(frozen=True, kw_only=True)
class SafetyRecovery:
    """With probability ``1 - share``, prompt and refusal; else ``k`` tokens of the harmful answer between them, not trained.

    ``k`` is uniform in {1, ..., min(max_prefix, its length)}. The refusal follows directly, in the same turn. The loss is one
    mean over all trained tokens of these rows and the ordinary ones; ``alpha`` is the share of these rows.

    Raises: ValueError for an ``alpha`` outside (0, 1), a ``share`` outside [0, 1] or a ``max_prefix`` below 1.
    """

    alpha: float = option(0.2, help="share of these rows among all rows of a step", above=0, high=1)
    share: float = option(0.5, help="share of them that start with a harmful answer", low=0, high=1)
    max_prefix: int = option(100, help="tokens of the harmful answer at most", low=1)

    def __post_init__(self) -> None:
        check_options(self)
        if self.alpha == 1:
            raise ValueError("SafetyRecovery.alpha must be in (0, 1), got 1. Without ordinary rows nothing is fine-tuned.")

    def rows_beside(self, ordinary: int) -> int:
        """Rows of this kind in a step with ``ordinary`` other rows; at least one."""
        return max(1, round(self.alpha / (1 - self.alpha) * ordinary))

    def prefix_length(self, length: int, generator: torch.Generator) -> int:
        """Draw k for a harmful answer of ``length`` tokens.

        Raises: ValueError if a prefix is drawn from an empty answer.
        """
        with_prefix, where = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        if with_prefix >= self.share:
            return 0
        if length < 1:
            raise ValueError("SafetyRecovery must have a harmful answer to start with, got an empty one. Fill it, or set share=0.")
        most = min(self.max_prefix, length)
        return min(1 + int(where * most), most)

    def row(self, prompt: Sequence[int], harmful: Sequence[int], refusal: Sequence[int], generator: torch.Generator) -> RecoveryRow:
        """One row from token ids; ``refusal`` ends with the end of the turn.

        Raises: ValueError for an empty refusal, and as `prefix_length`.
        """
        check_range("tokens of SafetyRecovery's refusal", len(refusal), low=1)
        k = self.prefix_length(len(harmful), generator)
        ids = [*prompt, *harmful[:k], *refusal]
        return RecoveryRow(ids, [False] * (len(prompt) + k) + [True] * len(refusal), k)
