"""Undo what hides a word from a word list: width, case, accents, invisible characters, look-alikes, leetspeak, spacing.

Folding keeps, for every character, where it came from, so that a finding points into the prompt as it was typed.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import ahocorasick

# Letters that look like Latin ones, case-folded: a choice of Unicode's confusables (Cyrillic, Greek, Armenian, small capitals).
_ALIKE = {
    "a": "аαᴀɑ", "b": "вьβʙƅ", "c": "сϲᴄ", "d": "ԁᴅđɗ", "e": "еεᴇ", "f": "ꜰ", "g": "ցɢɡ", "h": "нһհʜħ", "i": "іιɪı", "j": "јյᴊȷ",
    "k": "кκᴋ", "l": "ӏʟł", "m": "мᴍ", "n": "ηոɴ", "o": "оοօᴏøɵ", "p": "рρᴘ", "q": "ԛզ", "r": "гᴦʀ", "s": "ѕꜱ", "t": "тτᴛŧ",
    "u": "υսᴜ", "v": "νᴠ", "w": "ԝωᴡ", "x": "хχ", "y": "уγʏ", "z": "зᴢ",
}  # fmt: skip
LOOKALIKES = str.maketrans({char: latin for latin, chars in _ALIKE.items() for char in chars})
LEET = {
    "0": "o",
    "1": "i",
    "3": "e",
    "4": "a",
    "5": "s",
    "7": "t",
    "8": "b",
    "9": "g",
    "@": "a",
    "$": "s",
    "!": "i",
    "|": "i",
    "€": "e",
}
_ASCII_LOWER = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}
_LEET_WORD = re.compile(r"(?=\S*[a-z])(?=\S*[0134578@$!|€])[a-z0-9@$!|€]{3,}")
_ONE = r"[a-z0-9@$!]"
_SPACED = re.compile(rf"(?<![a-z0-9]){_ONE}( |(?: ?[.*_\-/|+,~] ?)){_ONE}(?:\1{_ONE})+(?![a-z0-9])")  # n a k e d; n.a.k.e.d
_SPACED_AFTER_ARTICLE = re.compile(_SPACED.pattern.replace("(?<![a-z0-9])", "(?<=a )", 1))  # a n u d e figure
_SPLIT = re.compile(r"(?<=[a-z])[.*_\-/|+~'’]+(?=[a-z])")
_LONG = re.compile(r"([a-z])\1{2,}")
_TRIPLES = ahocorasick.Automaton()
for _letter in "abcdefghijklmnopqrstuvwxyz":
    _TRIPLES.add_word(_letter * 3, _letter)
_TRIPLES.make_automaton()
_SIGNS = re.compile(r"[a-z][0134578@$|]|[0134578@$!|][a-z]|[a-z][.*_\-/|+~'][a-z]")  # what _LEET_WORD and _SPLIT need


@dataclass(frozen=True)
class View:
    """One reading of a prompt: words between single spaces, with a space before the first and after the last."""

    text: str
    origin: tuple[int, ...]  # index in the prompt of every character of ``text``; as long as ``text``

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Where ``text[start:end]`` stands in the prompt, as ``(start, end)``."""
        return self.origin[start], self.origin[end - 1] + 1


def fold(text: str) -> str:
    """Words in the form in which they are compared, joined by single spaces; ``""`` if there is none.

    NFKC and NFKD without marks, case folding, look-alikes as Latin letters, no invisible characters, punctuation as space.
    """
    if text.isascii():  # the usual prompt: some 20 times faster than character by character, and the same result
        return " ".join(text.translate(_ASCII_LOWER).split())
    return _words(_characters(text)).text.strip()


def views(prompt: str) -> Iterator[View]:
    """The plain reading first, then those that differ: leetspeak read as letters, spaced-out and split words joined."""
    plain = _characters(prompt)
    seen = set()
    for characters in (plain, *_variants(plain)):
        view = _words(characters)
        if view.text not in seen:
            seen.add(view.text)
            yield view


def readings(prompt: str) -> list[str]:
    """The texts of `views`, stripped."""
    if prompt.isascii() and _harmless_form(prompt.lower(), folded := fold(prompt)):
        return [folded]
    return [view.text.strip() for view in views(prompt)]


def clean(prompt: str) -> str:
    """For an encoder: invisible characters out, width and look-alikes undone, punctuation and accents kept, spaces single."""
    if prompt.isascii():
        return " ".join(prompt.split())
    words = []
    for word in unicodedata.normalize("NFKC", prompt).split():
        visible = "".join(char for char in word if not _invisible(char))
        words.append(_as_latin(visible) if _mixed_script(visible) else visible)
    return " ".join(words)


def _harmless_form(lower: str, folded: str) -> bool:
    """Whether no variant can differ from the plain reading. Most prompts are of this kind, so it must be quick."""
    if sum(len(word) == 1 for word in folded.split()) > 1 and (_SPACED.search(lower) or _SPACED_AFTER_ARTICLE.search(lower)):
        return False
    if next(_TRIPLES.iter(lower), None) is not None:
        return False
    return not (_odd(lower) and _SIGNS.search(lower))


def _odd(lower: str) -> bool:
    """Whether anything but letters, spaces, commas and a final full stop is there."""
    return not lower.rstrip(" .!?").replace(" ", "").replace(",", "").isalpha()


Characters = list[tuple[str, int]]  # a folded character and the index that it came from


def _characters(text: str) -> Characters:
    return [(out, index) for index, char in enumerate(text) for out in _fold_one(char)]


@lru_cache(maxsize=4096)
def _fold_one(char: str) -> str:
    """Zero or more folded characters. Marks and format characters give none; anything that is no letter or digit stays itself."""
    out = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", char)).casefold().translate(LOOKALIKES)
    return "".join(" " if one.isspace() else one for one in out if not _invisible(one))


def _invisible(char: str) -> bool:
    return unicodedata.category(char) in ("Cf", "Mn", "Me", "Cc") and not char.isspace()


def _mixed_script(word: str) -> bool:
    """A word of Latin and other letters, or of other letters that all look Latin: somebody hides something."""
    letters = [char for char in word if char.isalpha()]
    foreign = [char for char in letters if not unicodedata.normalize("NFKD", char)[0].isascii()]
    return bool(foreign) and _as_latin("".join(letters)).isascii()


def _as_latin(word: str) -> str:
    return "".join(_fold_one(char) or "" for char in word)


def _words(characters: Characters) -> View:
    """Runs of letters and digits, one space between them."""
    text, origin = [" "], [0]
    for char, index in characters:
        if char.isalnum():
            text.append(char)
            origin.append(index)
        elif text[-1] != " ":
            text.append(" ")
            origin.append(index)
    if text[-1] != " ":
        text.append(" ")
        origin.append(characters[-1][1] if characters else 0)
    return View("".join(text), tuple(origin))


def _variants(plain: Characters) -> Iterator[Characters]:
    """Readings of an obfuscated prompt. Each rule alone, then all together, so that no rule can spoil another's catch."""
    joined = _drop(plain, _SPACED, keep_alnum=True)
    after_article = _drop(plain, _SPACED_AFTER_ARTICLE, keep_alnum=True)
    unsplit = _drop(plain, _SPLIT, keep_alnum=False)
    yield from (joined, after_article, unsplit)
    for base in (plain, joined, after_article, _drop(joined, _SPLIT, keep_alnum=False)):
        for one in ("i", "l"):  # the digit 1 stands for both
            leet = _unleet(base, one)
            yield leet
            yield _shorten(leet, 1)
            yield _shorten(leet, 2)


def _text(characters: Characters) -> str:
    return "".join(char for char, _ in characters)


def _drop(characters: Characters, pattern: re.Pattern[str], *, keep_alnum: bool) -> Characters:
    """Without the separators inside every match; with ``keep_alnum`` the match's letters (and leet signs) stay."""
    gone: set[int] = set()
    for match in pattern.finditer(_text(characters)):
        inside = range(match.start(), match.end())
        gone |= {i for i in inside if not (keep_alnum and (characters[i][0].isalnum() or characters[i][0] in LEET))}
    return [pair for i, pair in enumerate(characters) if i not in gone]


def _unleet(characters: Characters, one: str) -> Characters:
    """Digits and signs read as letters, in words that hold a letter as well: "n4k3d" but not "1950"."""
    out = list(characters)
    for match in _LEET_WORD.finditer(_text(characters)):
        for i in range(match.start(), match.end()):
            char, index = out[i]
            out[i] = (one if char == "1" else LEET.get(char, char), index)
    return out


def _shorten(characters: Characters, length: int) -> Characters:
    """Runs of three or more equal letters cut to ``length``: "nuuude"."""
    gone = {i for match in _LONG.finditer(_text(characters)) for i in range(match.start() + length, match.end())}
    return [pair for i, pair in enumerate(characters) if i not in gone]
