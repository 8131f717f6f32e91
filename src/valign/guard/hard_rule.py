"""The rules that come before every stage and cannot be learnt, tuned or switched off: what they match is blocked, never rewritten.

A rule holds lists of words; a prompt that has a word of every list, in any spelling, is blocked. An age below ``ages_below``
counts as a word of the first list. A prompt with a word of the first list is blocked as well when another stage finds one of
``with_categories`` in it, so that a missing word in the other lists is no way round.
"""

import re
from collections.abc import Collection, Sequence

from valign.guard.records import Verdict
from valign.guard.text import readings
from valign.guard.words import WordList
from valign.policy import BlockRule, Policy

_NUMBERS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen",
    "fifteen", "sixteen", "seventeen",
)  # fmt: skip
_NUMBER = rf"(?P<n>\d{{1,2}}|{'|'.join(_NUMBERS)})"
_UNIT = r"(?:years?|yrs?|months?|weeks?|days?)"
AGES = (
    re.compile(rf"\b{_NUMBER} ?(?:{_UNIT} olds?|yo|y o|year olds?)\b"),
    re.compile(rf"\b(?:aged?|ages|age of|turning|turned) {_NUMBER}\b"),
    re.compile(r"\b(?P<n>\d{1,2})(?:yo|yrs?old|yearsold|yearold)\b"),
)


def youngest(text: str) -> int | None:
    """The lowest age named in a folded text, in years (months and days count as 0); None without one."""
    ages = [_years(match) for pattern in AGES for match in pattern.finditer(text)]
    return min(ages, default=None)


def _years(match: re.Match[str]) -> int:
    number = match["n"]
    years = _NUMBERS.index(number) + 1 if number in _NUMBERS else int(number)
    return 0 if re.search(r"month|week|day", match[0]) else years


class HardRule:
    """All ``always_block`` rules of a policy."""

    name = "hard-rule"
    level = "rule"

    def __init__(self, rules: Sequence[BlockRule]) -> None:
        self._rules = [(rule, [WordList(words) for words in rule.every]) for rule in rules]

    @classmethod
    def from_policy(cls, policy: Policy) -> "HardRule":
        return cls(policy.always_block)

    def check(self, prompt: str, findings: Collection[str] = ()) -> Verdict:
        """Fires if a rule matches in any reading of the prompt. ``findings``: categories that other stages found.

        The verdict has no span: nothing of such a prompt is kept but its hash.
        """
        texts = readings(prompt)
        for rule, lists in self._rules:
            first = any(lists[0].any(text) for text in texts) or any(_young(rule, text) for text in texts)
            others = all(any(words.any(text) for text in texts) for words in lists[1:])
            if first and (others or set(findings) & set(rule.with_categories)):
                message = "a rule that allows no rewrite"
                return Verdict(stage=self.name, level="rule", outcome="fire", rule=rule.id, action="block", message=message)
        return Verdict(stage=self.name, level="rule")


def _young(rule: BlockRule, text: str) -> bool:
    age = youngest(text) if rule.ages_below is not None else None
    return age is not None and rule.ages_below is not None and age < rule.ages_below
