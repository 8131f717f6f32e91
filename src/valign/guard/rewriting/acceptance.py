"""Checks of a rewrite's usefulness: one short caption, not a refusal, that keeps words and meaning. Safety is checked elsewhere."""

import re
from dataclasses import dataclass

from valign.checks import check_range
from valign.models.encoders.minilm import SentenceEncoder
from valign.policy import Policy
from valign.text import clean, fold

REFUSALS = re.compile(
    r"^\W*(?:i(?:'m| am) (?:sorry|unable|not able)|sorry|i can(?:no|')t|i will not|i won't|as an ai|unfortunately|here(?:'s| is) )",
    re.IGNORECASE,
)
MAX_GROWTH = 3.0  # a rewrite has at most this many times the prompt's characters, and 200 more


@dataclass(frozen=True)
class Acceptance:
    """``reason`` is "" for a usable rewrite. The two numbers are None where nothing was compared."""

    reason: str
    keep_words: float | None = None
    keep_meaning: float | None = None


def jaccard(one: str, two: str) -> float:
    """Shared words per distinct word of both, after folding, in [0, 1]; 1 for two empty texts."""
    left, right = set(fold(one).split()), set(fold(two).split())
    return len(left & right) / len(left | right) if left | right else 1.0


def recall(wanted: str, text: str) -> float:
    """Share of the distinct words of ``wanted`` that ``text`` holds, after folding, in [0, 1]; 1 if there are none."""
    asked, found = set(fold(wanted).split()), set(fold(text).split())
    return len(asked & found) / len(asked) if asked else 1.0


@dataclass(frozen=True, kw_only=True)
class Acceptor:
    """The checks of VALOR's released code: word Jaccard 0.4 and MiniLM cosine 0.7 by default."""

    keep_words: float = 0.4
    keep_meaning: float = 0.7
    encoder: SentenceEncoder | None = None  # None does not compare meaning
    instructions: tuple[str, ...] = ()  # texts that a chat model must not repeat
    edit_words: float = 0.3  # the same limits for proposals in which single words were changed
    edit_meaning: float = 0.3

    def __post_init__(self) -> None:
        check_range("Acceptor.keep_words", self.keep_words, low=0.0, high=1.0)
        check_range("Acceptor.keep_meaning", self.keep_meaning, low=-1.0, high=1.0)
        check_range("Acceptor.edit_words", self.edit_words, low=0.0, high=1.0)
        check_range("Acceptor.edit_meaning", self.edit_meaning, low=-1.0, high=1.0)

    @classmethod
    def from_policy(cls, policy: Policy, encoder: SentenceEncoder | None = None) -> "Acceptor":
        limits = policy.thresholds
        roles = tuple(role.text for role in policy.rewriters)
        return cls(
            keep_words=limits.keep_words,
            keep_meaning=limits.keep_meaning,
            encoder=encoder,
            instructions=roles,
            edit_words=limits.edit_words,
            edit_meaning=limits.edit_meaning,
        )

    def form(self, prompt: str, text: str) -> str:
        """Why the text is not a caption; "" if it is one."""
        folded = fold(text)
        if not folded:
            return "empty"
        if "\n" in text.strip():
            return "more than one line"
        if folded == fold(prompt):
            return "unchanged"
        if REFUSALS.match(text):
            return "a refusal"
        if len(text) > MAX_GROWTH * len(prompt) + 200:
            return "too long"
        if any(fold(part) in folded for words in self.instructions for part in words.split(". ") if len(part) > 30):
            return "repeats the instruction"
        return ""

    def __call__(self, prompt: str, text: str, *, edited: bool = False) -> Acceptance:
        """Form first, then words, then meaning. ``edited``: single words of the prompt were changed."""
        if reason := self.form(prompt, text):
            return Acceptance(reason)
        words = jaccard(prompt, text)
        meaning = None
        if self.encoder is not None:
            one, two = self.encoder.encode([clean(prompt), clean(text)])
            meaning = float(one @ two)
        if not words >= (self.edit_words if edited else self.keep_words):
            return Acceptance("keeps too few words", words, meaning)
        least = self.edit_meaning if edited else self.keep_meaning
        if meaning is not None and not meaning >= least:  # NaN too
            return Acceptance("keeps too little of the meaning", words, meaning)
        return Acceptance("", words, meaning)
