"""AUTOMATIC1111 and the Forge family: comments, networks, ``AND``, schedules, alternation, emphasis, ``BREAK``.

Source: ``modules/prompt_parser.py``, ``extra_networks.py`` and ``processing_scripts/comments.py`` of the web UI. Both states of
every schedule are given, whatever the steps: a hires pass has a clock of its own, and one early step fixes the layout.
"""

import re

from valign.text.syntax.brackets import Bracketed, Span, alternatives, top_level
from valign.text.syntax.emphasis import BREAK, chunks, plain
from valign.text.syntax.seen import Seen, Wildcards
from valign.text.syntax.traced import Traced, distinct, joined

COMMENT = re.compile(r"#[^\n]*")
NETWORK = re.compile(r"<(\w+):([^<>]*)>")
AND = re.compile(r"\bAND\b")
PART_WEIGHT = re.compile(r":\s*+([+-]?(?:\d+\.?|\d*\.\d+))\s*$")
NUMBER = re.compile(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*")
REGION = re.compile(r"\bADD(?:COL|ROW)\b")
COMMON, BASE = re.compile(r"\bADDCOMM\b"), re.compile(r"\bADDBASE\b")


def a1111(prompt: Traced, wildcards: Wildcards) -> Seen:
    text = prompt.without(COMMENT)
    names = tuple(text[match.start(2) : match.end(2)].split(re.compile(":"))[0] for match in NETWORK.finditer(text.text))
    text = text.without(NETWORK)
    found: dict[bool, list[Traced]] = {True: [], False: []}
    parts = text.split(AND)
    for part in parts:
        weight = PART_WEIGHT.search(part.text)
        shown = weight is None or float(weight[1]) >= 0
        found[shown] += _texts(part[: weight.start()] if weight else part)
    if len(found[True]) > 1 and len(parts) > 1:  # harm may be in what the parts mean together
        found[True].append(joined([part.stripped() for part in parts if not _pushes_away(part)], " "))
    return Seen(tuple(distinct(found[True])), tuple(distinct(found[False])), names)


def _pushes_away(part: Traced) -> bool:
    weight = PART_WEIGHT.search(part.text)
    return weight is not None and float(weight[1]) < 0


def _texts(part: Traced) -> list[Traced]:
    """One part's texts: every state of its schedules, without brackets, in chunks and regions."""
    states = alternatives(part, "[]", scheduled)
    inside = any(BREAK.search(group) for group in re.findall(r"[(\[][^()\[\]]*", part.text))
    found = []
    for state in states:
        for region in regions(state):
            for reading in plain(region):
                found += [*chunks(reading), *([reading] if inside else [])]  # in brackets the word itself is encoded
    return distinct(found)


def scheduled(text: str, group: Bracketed) -> list[Span] | None:
    """``[from:to:when]``, ``[to:when]`` and ``[a|b]``; anything else in square brackets is text with a lower weight."""
    start, stop = group.opens + 1, group.closes
    if bars := top_level(text, group, "|"):
        return list(zip([start, *(place + 1 for place in bars)], [*bars, stop]))
    colons = top_level(text, group, ":")
    if len(colons) not in (1, 2) or not NUMBER.fullmatch(text, colons[-1] + 1, stop):
        return None
    if len(colons) == 1:
        return [(start, start), (start, colons[0])]
    return [(start, colons[0]), (colons[0] + 1, colons[1])]


def regions(text: Traced) -> list[Traced]:
    """Regional Prompter: the common text stands before that of every region."""
    if not (REGION.search(text.text) or COMMON.search(text.text) or BASE.search(text.text)):
        return [text]
    base = text.split(BASE)
    common = base[-1].split(COMMON)
    first = common[0].stripped() if len(common) > 1 else text[:0]
    parts = [joined([first, part.stripped()], " " if first.text else "") for part in common[-1].split(REGION)]
    return [*(one.stripped() for one in base[:-1]), *parts]
