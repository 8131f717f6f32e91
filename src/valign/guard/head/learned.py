"""Level 2, trained: probabilities per category from the head (`valign.models.heads.prompt_head`), against calibrated thresholds."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from valign.checks import UserError, check_choice
from valign.guard.records import Verdict
from valign.models.encoders.minilm import MiniLM
from valign.models.heads.prompt_head import ANY, Head, load_head
from valign.policy import Policy
from valign.text import WordList, clean, fold, readings, views

SHIPPED = Path(__file__).parent / "assets" / "head.safetensors"


class LearnedStage:
    """Fires if any column reaches its threshold. The category is the one that exceeds its own threshold by most.

    Args: opposing: Phrases against a harm. A prompt that holds one scores no higher than what is left of it without them.
    """

    name = "learned"
    level = "semantic"

    def __init__(
        self,
        head: Head,
        encoder: MiniLM,
        *,
        strictness: str = "balanced",
        categories: Sequence[str] | None = None,
        opposing: Sequence[str] = (),
    ) -> None:
        if head.settings.encoder_sha256 != encoder.sha256:
            raise UserError("LearnedStage.head was trained on another encoder. Train it again, or install the encoder it names.")
        check_choice("LearnedStage.strictness", strictness, tuple(head.settings.thresholds), hint="Run `valign guard calibrate`.")
        self.head, self.encoder = head, encoder
        self._opposing = WordList(opposing) if opposing else None
        known = head.settings.categories
        wanted = known if categories is None else tuple(name for name in known if name in categories)
        if not wanted:
            raise UserError(
                f"LearnedStage.categories must have one of {', '.join(known)}, got none of them. Train a head for this policy."
            )
        self.categories = wanted
        self._columns = (ANY, *wanted) if wanted == known else wanted  # "any" covers categories that the policy may not have
        self._places = [head.settings.columns.index(name) for name in self._columns]
        self._limits = np.array([head.settings.thresholds[strictness][name] for name in self._columns])

    @classmethod
    def from_policy(cls, policy: Policy, encoder: MiniLM, head: Head | None = None) -> "LearnedStage":
        return cls(
            head or load_head(SHIPPED),
            encoder,
            strictness=policy.guard.strictness,
            categories=policy.category_ids(),
            opposing=policy.guard.opposing,
        )

    def check(self, prompt: str) -> Verdict:
        return self.check_many([prompt])[0]

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        """A verdict per prompt. A prompt with several readings (leetspeak, spacing) gets the highest score of all."""
        rests = {number: rest for number, prompt in enumerate(prompts) if (rest := self._rest(prompt)) != prompt}
        scores = self._scores([*prompts, *rests.values()])
        for number, rest in zip(rests, scores[len(prompts) :]):
            scores[number] = np.minimum(scores[number], rest)
        return [self._verdict(row) for row in scores[: len(prompts)]]

    def _scores(self, prompts: Sequence[str]) -> Float[np.ndarray, "prompt column"]:
        texts, owner = [], []
        for number, prompt in enumerate(prompts):
            for text in (clean(prompt), *self._telling(prompt)):
                texts.append(text)
                owner.append(number)
        scores = np.zeros((len(prompts), len(self.head.settings.columns)), np.float32)
        np.maximum.at(scores, owner, self.head.score(self.encoder, texts))
        return scores

    def _rest(self, prompt: str) -> str:
        """The prompt with spaces for opposing phrases."""
        if self._opposing is None or not self._opposing.any(fold(prompt)):
            return prompt
        view = next(views(prompt))
        found = {place for start, end, _ in self._opposing.find(view.text) for place in range(*view.span(start, end))}
        return "".join(" " if place in found else char for place, char in enumerate(prompt))

    def _telling(self, prompt: str) -> Iterator[str]:
        """Readings but the plain one that have a word which it has not, or which it has letter by letter."""
        plain, *others = readings(prompt)
        for text in others:
            new = set(text.split()) - set(plain.split())
            if any(word in self.encoder.words or (len(word) > 4 and " ".join(word) in plain) for word in new):
                yield text

    def _verdict(self, row: Float[np.ndarray, " column"]) -> Verdict:
        own = row[self._places]
        over = own - self._limits
        scores = dict(zip(self._columns, own.tolist()))
        margins = dict(zip(self._columns, over.tolist()))
        beyond = sorted((name for name in self.categories if margins[name] >= 0), key=lambda name: -margins[name])
        category = beyond[0] if beyond else max(self.categories, key=lambda name: scores[name])
        fired, column = bool((over >= 0).any()), int(over.argmax())
        return Verdict(
            stage=self.name,
            level="semantic",
            outcome="fire" if fired else "pass",
            category=category,
            also=tuple(beyond[1:]),
            score=float(own[column]),
            threshold=float(self._limits[column]),
            ranking=float(own[0]),
            scores={name: scores[name] for name in self.categories},
            message=f"reads like {category}" if fired else "",
        )
