"""Level 2, as in the paper: cosine between a prompt and reference sentences of harm (VALOR, arXiv 2511.11693)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from valign.checks import check_range
from valign.guard.records import Verdict
from valign.models.encoders.minilm import SentenceEncoder
from valign.policy import Policy
from valign.text import clean


@dataclass(frozen=True)
class Reference:
    """A sentence that stands for a concept."""

    text: str
    category: str
    concept: str


def references(policy: Policy) -> list[Reference]:
    """Names and paraphrases of every concept, in the policy's order."""
    return [
        Reference(text, category.id, concept.id)
        for category in policy.categories
        for concept in category.concepts
        for text in (concept.name, *concept.paraphrases)
    ]


class References:
    """Encoded references, to be compared with texts."""

    def __init__(self, encoder: SentenceEncoder, items: Sequence[Reference]) -> None:
        if not items:
            raise ValueError("References.items must not be empty, got none. Give the policy concepts.")
        self.encoder, self.items = encoder, list(items)
        self._vectors = encoder.encode([item.text for item in items])

    def cosines(self, texts: Sequence[str]) -> Float[np.ndarray, "text reference"]:
        """In [-1, 1]; a reference scores 1 against itself."""
        return np.clip(self.encoder.encode(list(texts)) @ self._vectors.T, -1, 1)


class SemanticStage:
    """Fires if the nearest reference's cosine exceeds the threshold (strictly, as in the paper)."""

    name = "semantic"
    level = "semantic"

    def __init__(self, encoder: SentenceEncoder, items: Sequence[Reference], threshold: float) -> None:
        check_range("SemanticStage.threshold", threshold, low=-1.0, high=1.0)
        self.threshold = threshold
        self.references = References(encoder, items)

    @classmethod
    def from_policy(cls, policy: Policy, encoder: SentenceEncoder) -> "SemanticStage":
        """The default threshold 0.32 belongs to all-MiniLM-L6-v2; calibrate it for another encoder."""
        return cls(encoder, references(policy), policy.thresholds.semantic)

    def check(self, prompt: str) -> Verdict:
        return self.check_many([prompt])[0]

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        """A verdict per prompt, in one pass of the encoder."""
        return [self._verdict(row) for row in self.references.cosines([clean(prompt) for prompt in prompts])]

    def _verdict(self, cosines: Float[np.ndarray, " reference"]) -> Verdict:
        best = int(cosines.argmax())
        item, score = self.references.items[best], float(cosines[best])
        scores: dict[str, float] = {}
        for one, cosine in zip(self.references.items, cosines.tolist()):
            scores[one.category] = max(cosine, scores.get(one.category, -1.0))
        others = sorted((name for name in scores if name != item.category), key=lambda name: -scores[name])
        return Verdict(
            stage=self.name,
            level="semantic",
            outcome="fire" if score > self.threshold else "pass",
            category=item.category,
            also=tuple(name for name in others if scores[name] > self.threshold),
            concept=item.concept,
            score=score,
            threshold=self.threshold,
            ranking=score,
            scores=scores,
            message=f"nearest to {item.concept}",
        )
