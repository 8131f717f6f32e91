"""Level 2, trained: probabilities per category from the head (`valign.models.heads.prompt_head`), against calibrated thresholds."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from valign.checks import UserError, check_choice
from valign.guard.records import Verdict
from valign.models.encoders.minilm import MiniLM
from valign.models.heads.prompt_head import ANY, Head, load_head
from valign.policy import Policy
from valign.text import WordList, clean, fold, readings, views

NEVER = 2.0  # a limit that no probability reaches
SHIPPED = Path(__file__).parent / "assets" / "head.safetensors"


class LearnedStage:
    """Fires if the column "any" reaches its threshold; where the policy lacks categories of the head, if one of the others does.

    Which category it is, given that it fires, is another question: the one with the highest probability. Categories that the prompt
    could have, at low limits of their own, are in the verdict's ``likely`` and ``possible``, for the block rules.

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
        self._deciding = (ANY,) if wanted == known else wanted  # "any" covers categories that the policy may not have
        self._places = {name: number for number, name in enumerate(head.settings.columns)}
        self._limits = head.settings.thresholds[strictness]
        low = head.settings.suspicion
        self._if_passed = {name: low.get("passed", {}).get(name, NEVER) for name in wanted}
        self._if_found = {name: low.get("found", {}).get(name, 0.0) for name in wanted}

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

    def fingerprint(self) -> str:
        """SHA-256 of the head's file; "" for one that was not read from a file."""
        return self.head.sha256

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

    def fires(self, scores: Float[np.ndarray, "prompt column"]) -> Bool[np.ndarray, " prompt"]:
        """Whether a deciding column reaches its threshold."""
        limits = np.array([self._limits[name] for name in self._deciding])
        return np.any(scores[:, [self._places[name] for name in self._deciding]] >= limits, axis=1)

    def _verdict(self, row: Float[np.ndarray, " column"]) -> Verdict:
        scores = {name: float(row[place]) for name, place in self._places.items()}
        fired = bool(self.fires(row[None])[0])
        column = max(self._deciding, key=lambda name: scores[name] - self._limits[name])
        named = sorted(self.categories, key=lambda name: -scores[name])
        category = named[0]
        return Verdict(
            stage=self.name,
            level="semantic",
            outcome="fire" if fired else "pass",
            category=category,
            also=tuple(name for name in named[1:] if scores[name] >= self._limits[name]) if fired else (),
            likely=tuple(name for name in named if scores[name] >= self._if_passed[name]),
            possible=tuple(name for name in named if scores[name] >= self._if_found[name]),
            score=scores[column],
            threshold=self._limits[column],
            ranking=scores[ANY],
            scores={name: scores[name] for name in self.categories},
            message=f"reads like {category}" if fired else "",
        )
