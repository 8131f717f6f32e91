"""Which words of a prompt carry its harm: words are left out, and the guard says what is left, many texts at a time.

Pure but for the ``risks`` that it is given. Phrases are left out as a whole, since one word of them may be harmless alone.
"""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

from valign.models.heads.edit_model import form, without, word_spans
from valign.text import fold
from valign.text.function_words import FUNCTION_WORDS

MOST_LOOKED_AT = 12  # content words; of longer prompts those of the parts that carry most of the harm
SAVED = 0.8  # share of the risk that is left without a word that carries it; where no word does, phrases are left out
FEWEST_PARTS = 4  # between commas, from which a prompt is a list whose parts can go
RUN = 4  # content words of a long prompt that are left out together at first
MOST_CHANGED = 6  # words beside those that must change anyway
FURTHER = 4  # larger sets that are tried beside the smallest one
Risks = Callable[[Sequence[str]], list[float]]  # relative to the threshold: from 1 on the guard finds something
PART = re.compile(r"[^,;.:]+")


def content_words(text: str) -> list[int]:
    """Numbers of the words that carry content."""
    return [number for number, (start, end) in enumerate(word_spans(text)) if fold(text[start:end]) not in FUNCTION_WORDS]


def carriers(
    text: str, words: Sequence[int], must: Sequence[int], likely: Sequence[float], risks: Risks, limit: float
) -> list[tuple[int, ...]]:
    """Sets of words, by number, without which the risk of the rest is below ``limit``: the smallest one and larger ones.

    Args:
        words: That may change.
        must: Words that change in any case.
        likely: Per word how likely it carries harm, which orders the words beyond the smallest set.
    Returns: Nothing where `MOST_CHANGED` words are not enough.
    """
    open_ = [word for word in _looked_at(text, words, risks) if word not in must]
    units: list[tuple[int, ...]] = [(), *((word,) for word in open_)]
    left = risks([without(text, [*must, *unit]) for unit in units])
    pairs = [(one, two) for one, two in pairwise(open_) if _adjacent(text, one, two)]
    if min(left) > SAVED * left[0] and pairs:
        units += pairs
        left = [*left, *risks([without(text, [*must, *pair]) for pair in pairs])]
    if left[0] < limit:
        smallest: list[int] = []
    else:
        ranked = [unit for _, _, unit in sorted(zip(left, map(len, units), units)) if unit]
        order = list(dict.fromkeys(word for unit in [*ranked[:1], *(one for one in ranked if len(one) == 1)] for word in unit))
        grown = [order[:size] for size in range(1, min(len(order), MOST_CHANGED) + 1)]
        after = risks([without(text, [*must, *words]) for words in grown])
        found = next((words for words, risk in zip(grown, after) if risk < limit), None)
        if found is None:
            return []
        smallest = found
    others = sorted((word for word in open_ if word not in smallest), key=lambda word: -likely[word])
    return [tuple(sorted({*must, *smallest, *others[:more]})) for more in range(min(FURTHER, len(others)) + 1)]


def parts_that_carry(text: str, risks: Risks, limit: float) -> list[tuple[int, int]]:
    """Of a list of parts between commas the fewest, as spans with their comma, without which the risk of the rest is below
    ``limit``; nothing for a text of fewer than `FEWEST_PARTS`, or where half of the parts are not enough."""
    parts = [found.span() for found in PART.finditer(text)]
    if len(parts) < FEWEST_PARTS:
        return []
    spans = [(max(0, start - 1), end) for start, end in parts]
    left = risks([_cut(text, [span]) for span in spans])
    order = [spans[number] for number in sorted(range(len(spans)), key=lambda number: left[number])]
    grown = [order[:size] for size in range(1, len(order) // 2 + 1)]
    after = risks([_cut(text, some) for some in grown])
    return next((sorted(some) for some, risk in zip(grown, after) if risk < limit), [])


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> str:
    return "".join(char for place, char in enumerate(text) if not any(start <= place < end for start, end in spans))


def _looked_at(text: str, words: Sequence[int], risks: Risks) -> list[int]:
    """At most `MOST_LOOKED_AT` of the words: those of the runs whose absence lowers the risk most."""
    if len(words) <= MOST_LOOKED_AT:
        return list(words)
    spans = word_spans(text)
    own: list[list[int]] = []
    for part in PART.finditer(text):
        inside = [word for word in words if part.start() <= spans[word][0] < part.end()]
        own += [inside[first : first + RUN] for first in range(0, len(inside), RUN)]
    left = risks([without(text, run) for run in own])
    best = sorted(range(len(own)), key=lambda number: left[number])[: MOST_LOOKED_AT // RUN]
    return sorted(word for number in best for word in own[number])


def _adjacent(text: str, one: int, two: int) -> bool:
    spans = word_spans(text)
    return two == one + 1 and not text[spans[one][1] : spans[two][0]].strip(" '’s-")


def droppable(text: str, words: Sequence[int]) -> list[int]:
    """Those of the words that can go without a gap: each stands behind a function word or comma and describes a word that stays."""
    spans, found = word_spans(text), []
    for word in words:
        before = fold(text[slice(*spans[word - 1])]) if word else ""
        opens = word == 0 or before in FUNCTION_WORDS or "," in text[spans[word - 1][1] : spans[word][0]]
        if word + 1 < len(spans) and word + 1 not in words and opens and form(fold(text[slice(*spans[word])])) != "s":
            follows = fold(text[slice(*spans[word + 1])])
            if text[spans[word][1] : spans[word + 1][0]] == " " and follows not in FUNCTION_WORDS:
                found.append(word)
    return found


def part_of(text: str, words: Sequence[int]) -> tuple[int, int] | None:
    """The part behind a comma that holds all of these words, with its comma; None where they are in several or in the first."""
    spans = word_spans(text)
    for found in list(PART.finditer(text))[1:]:
        if all(found.start() <= spans[word][0] and spans[word][1] <= found.end() for word in words):
            return found.start() - 1, found.end()
    return None
