"""What stands between the pieces of a word: emoji, empty brackets, weights, tags and alternatives of prompt syntax.

Image generators read ``wea(pon:1.2)``, ``wea<lora:any:0>pon``, ``[wea|x]pon`` and ``wea BREAK pon`` as one word or as two pieces,
and some emoji are letters to Unicode. Here it is said which characters of a prompt to leave out; the reading without them is one
more reading, so nothing is lost by it.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence

_EMOJI, _NOTHING, _LETTER = "\x01", "\x02", "w"  # of a skeleton: one character for each of the prompt
_START = re.compile(r"[(\[{<]|BREAK")
_KEYCAP = re.compile("[0-9#*]\ufe0f?\u20e3")
_BREAK = re.compile(r"\s*+\bBREAK\b\s*+")
_TAG = re.compile(r"<[^<>]*>")
_WEIGHT = re.compile(r":\s*+[+-]?[\d.]++\s*+(?=[)\]}])")
_SPACE = rf"[\s{_NOTHING}]*+"
_GAP = re.compile(rf"(?<=[a-z0-9])(?:{_SPACE}(?:{_EMOJI}|[)\]}}>]*+{_SPACE}[(\[{{<]))++{_SPACE}(?=[a-z0-9])")
_PAIR = re.compile(rf"(?<=[a-z0-9])[)\]}}>]++{_SPACE}[(\[{{<]++(?=[a-z0-9])")  # between (wea) (pon)
_CHOICE = re.compile(r"[\[{]([^\[\]{}]*+)[\]}]")
_OPTION = re.compile(r"[^|:]*+")
_NUMBER = re.compile(r"\s*+[+-]?[\d.]*+\s*+")
MAX_OPTIONS, MAX_NESTING = 8, 4  # of alternatives; what lies beyond is read in the plain reading only


def may_have_pieces(prompt: str) -> bool:
    """Whether an ASCII prompt holds anything that `between_pieces` could leave out; quick."""
    return _START.search(prompt) is not None


def between_pieces(prompt: str, folded: Sequence[str]) -> Iterator[frozenset[int]]:
    """Places of the characters to leave out, a set per reading; none where there is nothing between pieces.

    Args: folded: What each character of the prompt is folded to.
    """
    if prompt.isascii() and not may_have_pieces(prompt):
        return
    skeleton = _skeleton(prompt, folded)
    emoji = {place for place, char in enumerate(skeleton) if char == _EMOJI}
    letters = {place for place in emoji if any(map(str.isalnum, folded[place]))}  # flags, TM, keycaps
    syntax = _places(_BREAK, prompt) | _places(_TAG, skeleton) | _places(_WEIGHT, skeleton)
    seen = {frozenset[int]()}
    for dropped in (letters, syntax | letters, *_choices(skeleton, syntax | letters)):
        rest = "".join(_NOTHING if place in dropped - emoji else char for place, char in enumerate(skeleton))
        for more in (dropped, dropped | _places(_PAIR, rest), dropped | emoji | _places(_GAP, rest)):
            if (found := frozenset(more)) not in seen:
                seen.add(found)
                yield found


def _skeleton(prompt: str, folded: Sequence[str]) -> str:
    """A character for each of the prompt: folded, or a sign for an emoji, for nothing and for several letters."""
    chars = [one if len(one) == 1 else _LETTER if one else _NOTHING for one in folded]
    if not prompt.isascii():
        for place, char in enumerate(prompt):
            if not char.isascii() and unicodedata.category(char) in ("So", "Sk"):
                chars[place] = _EMOJI
        for match in _KEYCAP.finditer(prompt):
            chars[match.start()] = _EMOJI
    return "".join(chars)


def _places(pattern: re.Pattern[str], text: str) -> set[int]:
    return {place for match in pattern.finditer(text) for place in range(*match.span())}


def _choices(skeleton: str, dropped: set[int]) -> Iterator[set[int]]:
    """What to leave out so that of each group of alternatives the first is read, the second, and so on."""
    for number in range(MAX_OPTIONS):
        left, most = set(dropped), 0
        for _ in range(MAX_NESTING):
            text = "".join(_NOTHING if place in left else char for place, char in enumerate(skeleton))
            groups = [match for match in _CHOICE.finditer(text) if "|" in match[1] or ":" in match[1]]
            for group in groups:
                options = [
                    match for match in _OPTION.finditer(text, *group.span(1)) if match[0] and not _NUMBER.fullmatch(match[0])
                ]
                most = max(most, len(options))
                kept = options[min(number, len(options) - 1)] if options else None
                left |= {place for place in range(*group.span()) if kept is None or not kept.start() <= place < kept.end()}
            if not groups:
                break
        if number >= most:
            return
        yield left
