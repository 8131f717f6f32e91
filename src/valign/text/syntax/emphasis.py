"""Weights in brackets: the words as they reach the tokenizer, once joined and once apart."""

import re

from valign.text.syntax.traced import Traced, distinct, joined

WEIGHT = re.compile(r":\s*+[+-]?(?:\d+\.?\d*|\.\d+)\s*+(?=[)\]])")
ESCAPE = re.compile(r"\\(?=[()\[\]{}\\]?)")
BRACKET = re.compile(r"(?<!\\)[()\[\]]")
BREAK = re.compile(r"\bBREAK\b")


def plain(traced: Traced) -> list[Traced]:
    """The text without brackets and weights. Brackets are nothing in one reading, for runs of one weight are joined before they are
    tokenized, and a space between letters in another, for runs of two weights are not."""
    text = traced.without(WEIGHT)
    apart = joined(text.split(BRACKET), " ")
    return distinct([unescaped(text.without(BRACKET)), unescaped(apart)])


def unescaped(traced: Traced) -> Traced:
    return traced.without(ESCAPE) if "\\" in traced.text else traced


def chunks(traced: Traced) -> list[Traced]:
    """What ``BREAK`` parts: each part, all of them with a space between, and all of them with nothing between."""
    parts = [part.stripped() for part in traced.split(BREAK)]
    return [traced] if len(parts) == 1 else distinct([joined(parts, " "), *parts, joined(parts)])
