"""dynamic-prompts: variants, wildcards and variables, drawn before the web UI reads the text.

Source: ``adieyal/dynamicprompts``. A list of words that was not given is an unread one.
"""

import re

from valign.text.syntax.a1111 import a1111
from valign.text.syntax.brackets import Bracketed, Span, alternatives
from valign.text.syntax.comfyui import chosen
from valign.text.syntax.seen import Seen, Wildcards, together
from valign.text.syntax.traced import Traced, distinct, joined

VARIABLE = re.compile(r"\$\{(\w+)=!?([^{}]*)\}")
USE = re.compile(r"\$\{(\w+)(?::([^{}]*))?\}")
WILDCARD = re.compile(r"__[~@]?([\w*/-]+?)(?:\([^()]*\))?__")
COUNT = re.compile(r"\s*\d*(?:-\d*)?\$\$(?:[^|{}$]*\$\$)?")
SEVERAL = re.compile(r"\d*(?:-\d*)?\$\$|[{}|]")
CHANCE = re.compile(r"\s*[\d.]+::")
MOST_LINES = 16  # of a list that are read one by one; the others together


def dynamic(prompt: Traced, wildcards: Wildcards) -> Seen:
    values = {match[1]: prompt[match.start(2) : match.end(2)] for match in VARIABLE.finditer(prompt.text)}
    text = _replaced(prompt.without(VARIABLE), values)
    unread = tuple(dict.fromkeys(match[1] for match in WILDCARD.finditer(text.text) if match[1] not in wildcards))
    drawn = alternatives(text, "{}", variant)
    if "$$" in text.text:  # several options at once
        drawn.append(joined(text.split(SEVERAL), " "))
    found = [one for state in drawn for one in _listed(state, wildcards)]
    return together([a1111(one, wildcards) for one in distinct(found)] + [Seen((), unread=unread)])


def variant(text: str, group: Bracketed) -> list[Span] | None:
    """The options of ``{a|b}``, without how many are drawn (``2$$``) and how likely each is (``0.5::``)."""
    spans = chosen(text, group) or [(group.opens + 1, group.closes)]
    found = []
    for number, (start, stop) in enumerate(spans):
        head = (COUNT.match(text, start, stop) if number == 0 else None) or CHANCE.match(text, start, stop)
        place = head.end() if head else start
        chance = CHANCE.match(text, place, stop)
        found.append((chance.end() if chance else place, stop))
    return found


def _replaced(text: Traced, values: dict[str, Traced]) -> Traced:
    """With the values of variables, or else their defaults."""
    parts, last = [], 0
    for match in USE.finditer(text.text):
        default = text[match.start(2) : match.end(2)] if match[2] is not None else text[:0]
        parts += [text[last : match.start()], values.get(match[1], default)]
        last = match.end()
    return joined([*parts, text[last:]]) if parts else text


def _listed(text: Traced, wildcards: Wildcards) -> list[Traced]:
    """The text with each line of the lists that it names."""
    uses = [match for match in WILDCARD.finditer(text.text) if match[1] in wildcards]
    if not uses:
        return [text]
    found = []
    longest = max(len(wildcards[match[1]]) for match in uses)
    for number in range(min(longest, MOST_LINES)):
        found.append(_put(text, uses, [wildcards[match[1]][min(number, len(wildcards[match[1]]) - 1)] for match in uses]))
    if longest > MOST_LINES:
        found.append(_put(text, uses, [", ".join(wildcards[match[1]]) for match in uses]))
    return found


def _put(text: Traced, uses: list[re.Match[str]], lines: list[str]) -> Traced:
    parts, last = [], 0
    for match, line in zip(uses, lines):
        parts += [text[last : match.start()], Traced.made(line, text.origin[match.start()])]
        last = match.end()
    return joined([*parts, text[last:]])
