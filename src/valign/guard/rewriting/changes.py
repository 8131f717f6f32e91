"""Changes of words in a prompt, written back into it so that its syntax stays whole."""

import re
from collections.abc import Callable, Sequence

from valign.guard.rewriting.policy_rewriter import RewriteRequest
from valign.text import clean, fold
from valign.text.syntax import Traced, has_syntax

Change = tuple[int, int, str]  # start and end in characters, and what stands there afterwards
ARTICLE = re.compile(r"\b([Aa])n?(\s+)$")
TIDY = (
    (re.compile(r"\s+([,.;:!?])"), r"\1"),
    (re.compile(r"([,;:])(?:\s*[,;:])+"), r"\1"),
    (re.compile(r"^[\s,;:]+|[\s,;:]+$"), ""),
)


def changed(text: str, changes: Sequence[Change]) -> str:
    """The text with all changes; of two that overlap the first one counts. "a" and "an" before them follow their first letter."""
    parts, last = [], 0
    for start, end, word in sorted(changes):
        if start < last:
            continue
        between = text[last:start]
        if word[:1].isalpha():
            between = ARTICLE.sub(r"\1n\2" if word[0] in "aeiouAEIOU" else r"\1\2", between)
        parts += [between, word]
        last = end
    return "".join([*parts, text[last:]])


def tidy(text: str) -> str:
    """Single spaces, no doubled or dangling punctuation."""
    text = " ".join(text.split())
    for pattern, put in TIDY:
        text = pattern.sub(put, text)
    return text


def proposed(request: RewriteRequest, changes_of: Callable[[str], Sequence[Change]]) -> str | None:
    """The prompt with the changes of a plain text; None where there are none.

    Of a prompt with syntax every text that it tells the model is changed, if the guard finds something in it, and only the letters
    of these words are touched: brackets, weights and schedules stay where they are.
    """
    if not has_syntax(request.prompt):
        prompt = clean(request.prompt)
        text = tidy(changed(prompt, changes_of(prompt)))
    else:
        prompt, changes = request.prompt, []
        for told in request.texts:
            if told.text != prompt and request.suspicious(told.text):
                changes += _in_prompt(told, changes_of(told.text))
        text = changed(prompt, changes)
    return text if fold(text) and fold(text) != fold(prompt) else None


def _in_prompt(told: Traced, changes: Sequence[Change]) -> list[Change]:
    """Changes of a text that came from a prompt, as changes of the prompt: the new word stands where the first letter stood."""
    found: list[Change] = []
    for start, end, word in changes:
        runs = _runs(told.origin[start:end])
        found += [(first, last, word if number == 0 else "") for number, (first, last) in enumerate(runs)]
    return found


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive places as spans."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and place == runs[-1][1]:
            runs[-1] = (runs[-1][0], place + 1)
        elif not runs or not runs[-1][0] <= place < runs[-1][1]:
            runs.append((place, place + 1))
    return runs
