"""The intent of a suspicious prompt: to show the harm, to forbid it, or to teach about it.

An image model shows what is named, negated or not ("no weapons" shows weapons), so a good intent becomes a sign. A good intent
needs both a carrier (a sign, a poster, a quotation) and a word that forbids or teaches; a request to depict beats both, whatever
adjectives ("official", "educational") stand before it. It excuses what is on the sign, not what stands beside it, nor a notice that
bars people.
"""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

from valign.guard.records import Intent, Outcome, Verdict
from valign.policy import IntentionWords, Policy
from valign.text import WordList, fold

PAUSE = r"[,;.!?\n]"
MOST_PARTS = 16  # beside a sign that are looked at; each costs a pass of the guard
QUOTED = re.compile(r"[\"“”«»„]([^\"“”«»„]{3,})[\"“”«»„]|(?<!\w)['‘’]([^'‘’]{3,}(?:['’]\w[^'‘’]*)*)['’](?!\w)")


@runtime_checkable
class IntentJudge(Protocol):
    """Judges the intent of a prompt: by rules or by a chat model."""

    name: str
    uses_chat: bool

    def judge(self, prompt: str, findings: Sequence[Verdict]) -> Verdict: ...


class IntentionRules:
    """The rule-based judge; its words come from the policy, so that a language can have its own."""

    name = "intention"
    uses_chat = False

    def __init__(self, words: IntentionWords) -> None:
        self._prohibition = _list(words.prohibition)
        self._signage = _list(words.signage)
        self._education = _list(words.education)
        self._depiction = _list(words.depiction)
        joints = "|".join(map(re.escape, sorted(words.joints, key=len, reverse=True)))
        self._joint = re.compile(rf"{PAUSE}|\b(?:{joints})\b" if joints else PAUSE, re.IGNORECASE)
        self._unexcused = frozenset(words.unexcused)

    @classmethod
    def from_policy(cls, policy: Policy) -> "IntentionRules":
        return cls(policy.guard.intention)

    def judge(self, prompt: str, findings: Sequence[Verdict]) -> Verdict:
        """A verdict at level "intention": it fires unless the intent is good; ``rule`` holds the intent."""
        intent = self.intent(prompt)
        outcome: Outcome = "fire" if intent == "harmful" else "pass"
        return Verdict(stage=self.name, level="intention", outcome=outcome, rule=intent, message=f"the intent reads as {intent}")

    def objection(self, prompt: str, finding: Verdict, suspicious: Callable[[str], bool]) -> str:
        """Why a good intent does not excuse the finding; "" if it does.

        Args: suspicious: Whether a part of the prompt is a finding by itself.
        """
        category = next((name for name in (finding.category, *finding.also) if name in self._unexcused), "")
        if category and self.intent(prompt) == "prohibition":
            return f"a sign that forbids does not make {category} harmless"
        parts = self.beside(prompt)
        if len(parts) > MOST_PARTS:
            return f"there are more than {MOST_PARTS} parts beside the sign"
        return "there is harm beside the sign" if any(map(suspicious, parts)) else ""

    def beside(self, prompt: str) -> list[str]:
        """What stands between signs and parts that begin by forbidding, without what is quoted. Single words behind them go on a
        list ("a poster against rape, murder"), so it begins with two words or more."""
        request, runs = QUOTED.sub(" ", prompt), [""]
        borders = [0, *(place for joint in self._joint.finditer(request) for place in joint.span()), len(request)]
        for first, last in pairwise(borders):  # parts and joints in turns
            part, text = request[first:last], fold(request[first:last])
            if _holds(self._signage, text) or self._forbids(text):
                runs.append("")
            elif runs[-1] or " " in text:
                runs[-1] += part
        return [run.strip(" ,;.!?") for run in runs if run]

    def _forbids(self, text: str) -> bool:
        """Whether a part begins with a word that forbids."""
        first = next(self._prohibition.find(f" {text} "), None) if self._prohibition else None
        return first is not None and first[0] <= 1

    def intent(self, prompt: str) -> Intent:
        """``"prohibition"``, ``"education"`` or ``"harmful"``. What is quoted is what a sign says, not a wish."""
        quotes = [first or second for first, second in QUOTED.findall(prompt)]
        request, said = fold(QUOTED.sub(" ", prompt)), fold(" ".join(quotes))
        if _holds(self._depiction, request):
            return "harmful"
        carrier = _holds(self._signage, request)
        if not carrier:
            return "harmful"
        if _holds(self._prohibition, request) or _holds(self._prohibition, said):
            return "prohibition"
        return "education" if _holds(self._education, f"{request} {said}") else "harmful"


def _list(words: Sequence[str]) -> WordList | None:
    return WordList(words) if words else None


def _holds(words: WordList | None, text: str) -> bool:
    return words is not None and words.any(text)
