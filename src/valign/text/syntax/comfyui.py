"""ComfyUI: round brackets with weights, choices and comments of its browser page, ``embedding:name``, a prompt per encoder.

Source: ``comfy/sd1_clip.py``, ``formatUtil`` of the front end, and comfyui-prompt-control. Choices are drawn and comments cut in
the browser, so a program that talks to the server sends both as they are.
"""

import re

from valign.text.syntax.brackets import Bracketed, Span, alternatives, top_level
from valign.text.syntax.emphasis import chunks, plain
from valign.text.syntax.seen import Seen, Wildcards
from valign.text.syntax.traced import Traced, distinct, joined

EMBEDDING = re.compile(r"\bembedding:([\w./\\-]+)")
ENCODER = re.compile(r"\bTE\(\s*\w+\s*=\s*([^()]*)\)")


def comfyui(prompt: Traced, wildcards: Wildcards) -> Seen:
    names = tuple(prompt[match.start(1) : match.end(1)] for match in EMBEDDING.finditer(prompt.text))
    text = prompt.without(EMBEDDING)
    found: list[Traced] = []
    for writing in distinct([text, without_comments(text)]):
        own = [writing[match.start(1) : match.end(1)] for match in ENCODER.finditer(writing.text)]
        for one in [*own, writing.without(ENCODER)] if own else [writing]:
            for drawn in [one, *alternatives(one, "{}", chosen)] if "{" in one.text else [one]:
                found += [part for reading in plain(drawn) for part in chunks(reading)]
    return Seen(tuple(distinct(found)), (), names)


def without_comments(traced: Traced) -> Traced:
    """Without ``/* */`` and what stands behind ``//`` in a line."""
    text, parts, place = traced.text, [], 0
    while 0 <= (start := text.find("/", place)) < len(text) - 1:
        if text[start + 1] == "*" and (end := text.find("*/", start + 2)) < 0:
            break  # never closed: text
        if text[start + 1] == "/":
            end = text.find("\n", start)
            end = len(text) if end < 0 else end
        elif text[start + 1] == "*":
            end += 2
        else:
            start, end = start + 1, start + 1
        parts.append(traced[place:start])
        place = end
    return joined([*parts, traced[place:]])


def chosen(text: str, group: Bracketed) -> list[Span] | None:
    """``{a|b}``; a group without a bar is text."""
    bars = top_level(text, group, "|")
    return list(zip([group.opens + 1, *(place + 1 for place in bars)], [*bars, group.closes])) if bars else None
