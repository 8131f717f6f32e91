"""The policy's categories in OpenAI's thirteen. What has no key there is left to the ``guard`` part of an answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from valign.guard.records import GuardDecision
from valign.policy import Policy
from valign.serving.schemas import OPENAI_CATEGORIES, ModerationResult

OPENAI = {
    "hate": "hate",
    "harassment": "harassment",
    "violence": "violence",
    "self-harm": "self-harm",
    "sexual": "sexual",
    "shocking": "violence/graphic",
    "illegal-activity": "illicit",
}
MINORS = "sexual/minors"
NUDITY = ("nudenet", "safety-checker")  # detectors whose every class is nudity


@dataclass(frozen=True)
class PartFindings:
    """OpenAI's keys of one part of a message: scores, and which are true."""

    kind: Literal["text", "image"]
    scores: Mapping[str, float]
    found: frozenset[str]


def text_findings(policy: Policy, decision: GuardDecision) -> PartFindings:
    """Of a decision. Intent counts: a sign that forbids is not flagged."""
    scores = {OPENAI[name]: decision.scores.get(name, 0.0) for name in policy.category_ids() if name in OPENAI}
    found = {OPENAI[name] for name in decision.categories if name in OPENAI}
    minors = {rule.id for rule in policy.always_block if rule.ages_below is not None and "sexual" in rule.with_categories}
    if minors:
        scores[MINORS] = float(any(verdict.fired and verdict.rule in minors for verdict in decision.trace))
        found |= {MINORS} if scores[MINORS] else set()
    return PartFindings("text", scores, frozenset(found if decision.flagged else ()))


def image_findings(scores: Mapping[str, float], threshold: float, detector: str) -> PartFindings:
    """Of a detector's row. Classes of several detectors are named ``detector:class``."""
    best: dict[str, float] = {}
    for name, score in scores.items():
        source, _, own = name.rpartition(":")
        key = "sexual" if (source or detector).startswith(NUDITY) else OPENAI.get(own)
        if key is not None:
            best[key] = max(score, best.get(key, 0.0))
    return PartFindings("image", best, frozenset(key for key, score in best.items() if score >= threshold))


def merge(parts: Sequence[PartFindings]) -> ModerationResult:
    """One result for all parts of a message."""
    scores = dict.fromkeys(OPENAI_CATEGORIES, 0.0)
    kinds: dict[str, list[Literal["text", "image"]]] = {key: [] for key in OPENAI_CATEGORIES}
    for part in parts:
        for key, score in part.scores.items():
            scores[key] = min(1.0, max(score, scores[key]))
            if part.kind not in kinds[key]:
                kinds[key].append(part.kind)
    found = frozenset().union(*(part.found for part in parts))
    return ModerationResult(
        flagged=bool(found),
        categories={key: key in found for key in OPENAI_CATEGORIES},
        category_scores=scores,
        category_applied_input_types=kinds,
    )
