"""Block rules (``always_block``): what is always blocked, in any spelling. For the guard and for the data builders.

A rule holds lists of words; a prompt that has a word of every list is blocked. An age below ``ages_below`` counts as a word of the
first list. A prompt with a word of the first list is blocked as well when something else found one of ``with_categories`` in it, so
that leaving out a word of the other lists does not get round the rule.
"""

import re
from collections.abc import Collection, Sequence
from functools import lru_cache

from valign.policy.schema import BlockRule, Policy
from valign.text import WordList, readings

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


_word_list = lru_cache(maxsize=256)(WordList)  # a policy's rules are the same under every safety config


class BlockRules:
    """The matcher of all block rules of a policy."""

    def __init__(self, rules: Sequence[BlockRule]) -> None:
        self._rules = [(rule, [_word_list(tuple(words)) for words in rule.every]) for rule in rules]

    def match(self, prompt: str, findings: Collection[str] = ()) -> BlockRule | None:
        """The first rule that blocks the prompt. ``findings``: categories that were found in it by other means."""
        texts = readings(prompt)
        for rule, (first, *others) in self._rules:
            if not set(findings) & set(rule.with_categories) and not all(_holds(words, texts) for words in others):
                continue
            if _holds(first, texts) or _young(rule, texts):
                return rule
        return None

    def concerns(self, prompt: str) -> bool:
        """Whether the prompt has a word of the first list of a rule that a finding would complete."""
        texts = readings(prompt)
        return any(_holds(lists[0], texts) or _young(rule, texts) for rule, lists in self._rules if rule.with_categories)


def softens(own: BlockRule, base: BlockRule) -> bool:
    """Whether a prompt could pass ``own`` that ``base`` blocks: a word, an age or a category is gone, or a list was added."""
    (first, *others), lists = [set(words) for words in own.every], [set(words) for words in base.every]
    if not first >= lists[0] or not all(any(words >= known for known in lists) for words in others):
        return True
    ages = base.ages_below is not None and (own.ages_below is None or own.ages_below < base.ages_below)
    return ages or not set(own.with_categories) >= set(base.with_categories)


def gaps(policy: Policy) -> list[str]:
    """What the block rules of a policy cannot do, a sentence each; whoever serves it should know."""
    if not policy.always_block:
        return [f"Policy {policy.id} has no block rules (always_block): nothing is blocked whatever the categories say."]
    return [
        f"Block rule {rule.id} asks for the category {name}, which policy {policy.id} lacks: only the rule's own words count."
        for rule in policy.always_block
        for name in rule.with_categories
        if name not in policy.category_ids()
    ]


def _holds(words: WordList, texts: Sequence[str]) -> bool:
    return any(words.any(text) for text in texts)


def _young(rule: BlockRule, texts: Sequence[str]) -> bool:
    if rule.ages_below is None:
        return False
    ages = [age for text in texts if (age := youngest(text)) is not None]
    return bool(ages) and min(ages) < rule.ages_below


def youngest(text: str) -> int | None:
    """The lowest age named in a folded text, in years (months and days count as 0); None without one."""
    ages = [_years(match) for pattern in AGES for match in pattern.finditer(text)]
    return min(ages, default=None)


def _years(match: re.Match[str]) -> int:
    number = match["n"]
    years = _NUMBERS.index(number) + 1 if number in _NUMBERS else int(number)
    return 0 if re.search(r"month|week|day", match[0]) else years
