"""compel, in InvokeAI and diffusers: ``word+``, ``(a b)1.3``, ``("a", "b").blend(1, -1)``, ``a.swap(b)``, ``withLora(name)``.

Source: ``Reference.md`` of compel. Parts are joined with a space; a swap shows both words, and a blend all of its parts.
"""

import re

from valign.text.syntax.emphasis import unescaped
from valign.text.syntax.seen import Seen, Wildcards
from valign.text.syntax.traced import Traced, distinct, joined

LORA = re.compile(r"\bwithLora\(\s*([^(),]+)[^()]*\)")
SWAP = re.compile(r"(\w+)\)?\.swap\(([^()]*)\)")
CONJUNCTION = re.compile(r"\(((?:\s*+\"[^\"]*+\"\s*+,?+)++)\)\.(?:blend|and)\(([^()]*)\)")
QUOTED = re.compile(r'"([^"]*)"')
SIGNS = re.compile(r"(?<=[\w)])(?:\++|-+(?![\w]))|(?<=\))[\d.]+")
BRACKET = re.compile(r"(?<!\\)[()]")


def compel(prompt: Traced, wildcards: Wildcards) -> Seen:
    names = tuple(prompt[match.start(1) : match.end(1)] for match in LORA.finditer(prompt.text))
    text = prompt.without(LORA)
    shown = [text.without(CONJUNCTION)]
    away: list[Traced] = []
    for match in CONJUNCTION.finditer(text.text):
        weights = [_number(one) for one in match[2].split(",")]
        for number, part in enumerate(QUOTED.finditer(match[1])):
            start = match.start(1)
            one = text[start + part.start(1) : start + part.end(1)]
            (away if number < len(weights) and weights[number] < 0 else shown).append(one)
    return Seen(tuple(distinct([one for part in shown for one in _words(part)])), tuple(distinct(away)), names)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 1.0


def _words(text: Traced) -> list[Traced]:
    """Both words of a swap, without signs of weight."""
    states = []
    for which in (1, 2) if ".swap(" in text.text else ():
        parts, last = [], 0
        for match in SWAP.finditer(text.text):
            parts += [text[last : match.start()], text[match.start(which) : match.end(which)]]
            last = match.end()
        states.append(joined([*parts, text[last:]]))
    return [unescaped(joined(state.without(SIGNS).split(BRACKET), " ")) for state in states or [text]]
