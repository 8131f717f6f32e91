"""Level 2, trained: probabilities per category from the head (`valign.guard.head`), against calibrated thresholds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from valign.checks import UserError, check_choice
from valign.guard.head import ANY, Head, load_head
from valign.guard.records import Verdict
from valign.guard.text import clean, readings
from valign.models.minilm import MiniLM
from valign.policy import Policy

SHIPPED = Path(__file__).parent / "assets" / "head.safetensors"


class LearnedStage:
    """Fires if any column reaches its threshold. The category is the one that exceeds its own threshold by most."""

    name = "learned"
    level = "semantic"

    def __init__(self, head: Head, encoder: MiniLM, *, strictness: str = "balanced") -> None:
        if head.settings.encoder_sha256 != encoder.sha256:
            raise UserError("LearnedStage.head was trained on another encoder. Train it again, or install the encoder it names.")
        check_choice("LearnedStage.strictness", strictness, tuple(head.settings.thresholds), hint="Run `valign guard calibrate`.")
        self.head, self.encoder = head, encoder
        self.thresholds = head.settings.thresholds[strictness]

    @classmethod
    def from_policy(cls, policy: Policy, encoder: MiniLM, head: Head | None = None) -> "LearnedStage":
        return cls(head or load_head(SHIPPED), encoder, strictness=policy.guard.strictness)

    def check(self, prompt: str) -> Verdict:
        return self.check_many([prompt])[0]

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        """A verdict per prompt. A prompt with several readings (leetspeak, spacing) gets the highest score of all."""
        texts, owner = [], []
        for number, prompt in enumerate(prompts):
            for text in (clean(prompt), *readings(prompt)[1:]):
                texts.append(text)
                owner.append(number)
        scores = np.zeros((len(prompts), len(self.head.settings.columns)), np.float32)
        np.maximum.at(scores, owner, self.head.score(self.encoder, texts))
        return [self._verdict(row) for row in scores]

    def _verdict(self, row: Float[np.ndarray, " column"]) -> Verdict:
        limits = np.array([self.thresholds[name] for name in self.head.settings.columns])
        over = row - limits
        fired = bool((over >= 0).any())
        category = self.head.settings.categories[int(over[1:].argmax() if (over[1:] >= 0).any() else row[1:].argmax())]
        column = int(over.argmax())
        return Verdict(
            stage=self.name,
            level="semantic",
            outcome="fire" if fired else "pass",
            category=category,
            score=float(row[column]),
            threshold=float(limits[column]),
            scores={name: float(score) for name, score in zip(self.head.settings.columns, row) if name != ANY},
            message=f"reads like {category}" if fired else "",
        )
