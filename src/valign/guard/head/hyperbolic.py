"""The level of meaning in hyperbolic space: how far a prompt lies from the root of a CLIP that knows unsafe content (HySAC)."""

from collections.abc import Sequence

from valign.checks import UserError
from valign.guard.records import Verdict
from valign.models.encoders.hyperbolic_clip import HyperbolicClip
from valign.models.hyperbolic.lorentz import root_distance
from valign.policy import Policy


class HyperbolicStage:
    """Fires if the probability of harm at a prompt's distance to the root reaches the CLIP's limit for prompts.

    The category is that of the nearest unsafe caption it was trained on, among those that the policy has.

    Args: categories: That may be found; all of the CLIP's if left out.
    Raises: UserError if it was trained on none of them.
    """

    name = "hysac"
    level = "semantic"

    def __init__(self, clip: HyperbolicClip, *, categories: Sequence[str] | None = None) -> None:
        known = tuple(dict.fromkeys(clip.captions.categories))
        self.categories = known if categories is None else tuple(name for name in known if name in categories)
        if not self.categories:
            raise UserError(
                f"HyperbolicStage.categories must have one of {', '.join(known)}, got none. Train one on this policy's data."
            )
        self.clip = clip

    @classmethod
    def from_policy(cls, policy: Policy, clip: HyperbolicClip) -> "HyperbolicStage":
        return cls(clip, categories=policy.category_ids())

    def check(self, prompt: str) -> Verdict:
        return self.check_many([prompt])[0]

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        """A verdict per prompt, in one pass of the text encoder."""
        points = self.clip.text_points(prompts)
        limit = self.clip.card.text
        harm = limit.probability(root_distance(points, self.clip.curvature).double().cpu().numpy())
        scores = [{name: row[name] for name in self.categories} for row in self.clip.category_scores(points)]
        return [self._verdict(float(score), limit.limit, near) for score, near in zip(harm, scores)]

    def fingerprint(self) -> str:
        return self.clip.weights_sha256

    def _verdict(self, harm: float, limit: float, near: dict[str, float]) -> Verdict:
        category = max(self.categories, key=lambda name: near[name])
        fired = harm >= limit
        return Verdict(
            stage=self.name,
            level="semantic",
            outcome="fire" if fired else "pass",
            category=category,
            score=harm,
            threshold=limit,
            ranking=harm,
            scores={category: harm},
            message=f"reads like {category}" if fired else "",
        )
