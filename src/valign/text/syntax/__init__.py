"""The syntax in which people type prompts, per front end, and what an image model is told by it.

A dialect is one function and one row of `DIALECTS`. Every dialect is total: broken syntax is text, in linear time.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

from valign.text.syntax.a1111 import a1111
from valign.text.syntax.comfyui import comfyui
from valign.text.syntax.compel import compel
from valign.text.syntax.dynamic import dynamic
from valign.text.syntax.others import as_it_stands, midjourney, novelai, swarmui
from valign.text.syntax.seen import Dialect, Seen, Wildcards, together
from valign.text.syntax.traced import Traced

UNKNOWN = "unknown"  # the front end is not known: every dialect is read, the text as it stands among them
DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        "none": as_it_stands,
        "a1111": a1111,
        "comfyui": comfyui,
        "compel": compel,
        "dynamic": dynamic,
        "novelai": novelai,
        "midjourney": midjourney,
        "swarmui": swarmui,
    }
)
SIGNS = re.compile(
    r"[()\[\]{}<>|\\#$]|::|__|//|/\*|\bBREAK\b|\bA(?:ND|DD[A-Z]+)\b|:\s*-?[\d.]+\s*$|embedding:|(?:^|\s)--\w|\w(?:\+|-+(?![\w-]))|\.swap\("
)


def has_syntax(prompt: str) -> bool:
    """Whether any dialect could read the prompt otherwise than as it stands; quick."""
    return SIGNS.search(prompt) is not None


def seen(prompt: str, dialect: str = UNKNOWN, wildcards: Wildcards = MappingProxyType({})) -> Seen:
    """What the model is told.

    Args:
        dialect: A name of `DIALECTS`, or `UNKNOWN` for all of them together.
        wildcards: Lists of words by name, where the dialect has such.
    """
    text = Traced.of(prompt)
    if not has_syntax(prompt):
        return Seen((text,))
    if dialect != UNKNOWN:
        return DIALECTS[dialect](text, wildcards)
    return together(read(text, wildcards) for read in DIALECTS.values())


__all__ = ["DIALECTS", "UNKNOWN", "Seen", "Traced", "Wildcards", "has_syntax", "seen"]
