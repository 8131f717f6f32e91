"""Dialects of a few lines each: text as it stands, NovelAI, Midjourney and SwarmUI."""

import re

from valign.text.syntax.brackets import Bracketed, Span, alternatives, top_level
from valign.text.syntax.emphasis import plain
from valign.text.syntax.seen import Seen, Wildcards
from valign.text.syntax.traced import Traced, distinct, joined

BRACE = re.compile(r"[{}]")
NOVELAI_WEIGHT = re.compile(r"-?\d+(?:\.\d+)?::|::|\|")
OPTION = re.compile(r"(?:^|\s)--(?!no\b)\w+(?:\s+[\w.:]+)?")
NO = re.compile(r"(?:^|\s)--no\s+(.*?)(?=\s--|$)", re.DOTALL)
PART = re.compile(r"::\s*(-?[\d.]*)")
SWARM = re.compile(r"<(?:random|alternate|alt|fromto\[[^\]]*\]|fromto)(?:\[[^\]]*\])?:([^<>]*)>")
SWARM_NAME = re.compile(r"<(?:lora|embed|embedding|wildcard|preset|p):([^<>:]*)[^<>]*>")
BETWEEN = re.compile(r"\|\||[|,]")
SWARM_BREAK = re.compile(r"<break>")


def as_it_stands(prompt: Traced, wildcards: Wildcards) -> Seen:
    """diffusers: no syntax at all."""
    return Seen((prompt,))


def novelai(prompt: Traced, wildcards: Wildcards) -> Seen:
    """``{a}``, ``[a]`` and ``1.5::a::`` are weights."""
    text = prompt.without(NOVELAI_WEIGHT)
    return Seen(tuple(distinct([one for brace in ("", " ") for one in plain(joined(text.split(BRACE), brace))])))


def midjourney(prompt: Traced, wildcards: Wildcards) -> Seen:
    """``a::2 b`` in parts, ``--no a``, ``{a, b}``."""
    away = [prompt[match.start(1) : match.end(1)] for match in NO.finditer(prompt.text)]
    text = prompt.without(NO).without(OPTION)
    shown: list[Traced] = []
    last = 0
    for match in PART.finditer(text.text):
        pushed = match[1].startswith("-")
        (away if pushed else shown).append(text[last : match.start()])
        last = match.end()
    shown.append(text[last:])
    if len(shown) > 1:
        shown.append(joined([one.stripped() for one in shown], " "))
    drawn = [one for part in shown for one in ([part] if "{" not in part.text else alternatives(part, "{}", _listed))]
    return Seen(tuple(distinct(drawn)), tuple(distinct(away)))


def _listed(text: str, group: Bracketed) -> list[Span] | None:
    commas = top_level(text, group, ",")
    return list(zip([group.opens + 1, *(place + 1 for place in commas)], [*commas, group.closes]))


def swarmui(prompt: Traced, wildcards: Wildcards) -> Seen:
    """``<random:a|b>`` and its like are choices; ``<lora:name>`` a name."""
    names = tuple(prompt[match.start(1) : match.end(1)] for match in SWARM_NAME.finditer(prompt.text))
    text = joined(prompt.without(SWARM_NAME).split(SWARM_BREAK), " ")
    longest = max((len(BETWEEN.split(match[1])) for match in SWARM.finditer(text.text)), default=1)
    found = []
    for number in range(min(longest, 8)):
        parts, last = [], 0
        for match in SWARM.finditer(text.text):
            options = text[match.start(1) : match.end(1)].split(BETWEEN)
            parts += [text[last : match.start()], options[min(number, len(options) - 1)]]
            last = match.end()
        found.append(joined([*parts, text[last:]]))
    return Seen(tuple(distinct([one for state in found for one in plain(state)])), (), names)
