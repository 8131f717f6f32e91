"""The level of meaning, as the model reads it: a linear probe on the text encoders of the model that will generate."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from valign.checks import UserError
from valign.guard.records import Verdict
from valign.models.heads.text_probe import TextProbe
from valign.policy import Policy

POSSIBLE = 0.01  # probability from which a category is not excluded, for the block rules


class ProbeStage:
    """Fires if the probability of all harm together reaches the probe's threshold. The category is the most probable one.

    The prompt is read as it stands: the model gets it so, and what its encoders cannot read it cannot show.

    Args: categories: That may be found; all of the probe's if left out. The probability of the others counts for no harm.
    Raises: UserError if the probe knows none of them.
    """

    name = "probe"
    level = "semantic"

    def __init__(self, probe: TextProbe, *, categories: Sequence[str] | None = None) -> None:
        known = probe.categories
        self.categories = known if categories is None else tuple(name for name in known if name in categories)
        if not self.categories:
            raise UserError(
                f"ProbeStage.categories must have one of {', '.join(known)}, got none of them. Fit a probe with this policy's data."
            )
        self.probe = probe
        self._columns = [1 + known.index(name) for name in self.categories]

    @classmethod
    def from_policy(cls, policy: Policy, probe: TextProbe) -> "ProbeStage":
        return cls(probe, categories=policy.category_ids())

    def check(self, prompt: str) -> Verdict:
        return self.check_many([prompt])[0]

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        """A verdict per prompt, in one pass of the text encoders."""
        return [self._verdict(row) for row in self.probe.probabilities(prompts)[:, self._columns]]

    def fingerprint(self) -> str:
        return self.probe.fingerprint()

    def _verdict(self, row: Float[np.ndarray, " category"]) -> Verdict:
        scores = dict(zip(self.categories, row.tolist()))
        ranked = sorted(self.categories, key=lambda name: -scores[name])
        harm, limit = min(float(row.sum()), 1.0), self.probe.threshold
        return Verdict(
            stage=self.name,
            level="semantic",
            outcome="fire" if harm >= limit else "pass",
            category=ranked[0],
            also=tuple(name for name in ranked[1:] if scores[name] >= limit),
            possible=tuple(name for name in ranked if scores[name] >= POSSIBLE),
            score=harm,
            threshold=limit,
            ranking=harm,
            scores=scores,
            message=f"reads like {ranked[0]}" if harm >= limit else "",
        )
