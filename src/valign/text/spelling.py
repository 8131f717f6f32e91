"""Undo what hides a word from a word list: width, case, accents, unseen characters, look-alikes, leetspeak, spacing.

A prompt has a plain reading and, where it is written oddly, others. Each rule is tried alone and all are tried together, so that no
rule hides what another finds. A reading knows where its words came from, so that a finding points into the prompt as it was typed.
Unseen characters (`valign.text.unseen`) are nothing in the plain reading, and spaces in a second one. What stands between the
pieces of a word, such as emoji and the brackets of prompt syntax, is taken out in readings of its own (`valign.text.pieces`).
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from valign.text.pieces import between_pieces, may_have_pieces
from valign.text.unseen import WIDE, is_unseen

# Letters that look like Latin ones, case-folded: a choice of Unicode's confusables (Cyrillic, Greek, Armenian, small capitals).
_ALIKE = {
    "a": "аαᴀɑ", "b": "вьβʙƅ", "c": "сϲᴄ", "d": "ԁᴅđɗ", "e": "еεᴇ", "f": "ꜰ", "g": "ցɢɡ", "h": "нһհʜħ", "i": "іιɪı", "j": "јյᴊȷ",
    "k": "кκᴋ", "l": "ӏʟł", "m": "мᴍ", "n": "ηոɴ", "o": "оοօᴏøɵ", "p": "рρᴘ", "q": "ԛզ", "r": "гᴦʀ", "s": "ѕꜱ", "t": "тτᴛŧ",
    "u": "υսᴜ", "v": "νᴠ", "w": "ԝωᴡ", "x": "хχ", "y": "уγʏ", "z": "зᴢ",
}  # fmt: skip
_ENCLOSED = (0x1F150, 0x1F170, 0x1F1E6)  # black circled and squared A, flag letter A: NFKC undoes the white ones alone
LOOKALIKES = str.maketrans({char: latin for latin, chars in _ALIKE.items() for char in chars})
LOOKALIKES |= dict.fromkeys(map(ord, "‐‑‒–—―⁃−⸺⸻〜〰゠᠆˗➖─━╌╴⎯⏤"), "-") | dict.fromkeys(map(ord, "·•‧∙⋅・"), ".")
LOOKALIKES |= dict.fromkeys([*range(0x2B9, 0x2E0), *range(0x2E5, 0x300)], "'")  # spacing modifiers, letters to Unicode
LOOKALIKES |= {first + place: chr(ord("a") + place) for first in _ENCLOSED for place in range(26)}
LEET = {one: str.maketrans("034578$9@!|€1", f"oeastbsgaiie{one}") for one in "il"}  # the digit 1 stands for both
_LOWER = {code: " " if chr(code).isspace() else chr(code).lower() if chr(code).isprintable() else None for code in range(128)}
_WORDS = {code: char if char is None or char.isalnum() else " " for code, char in _LOWER.items()}
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")  # of ASCII, without white space
_TOKEN = re.compile(r"\S+")
_NO_LETTER = re.compile(r"[\W_]+")
_LEET_RUN = re.compile(r"[a-z0-9@$!|€]{3,}")
_TO_LETTER, _TO_SIGN = re.compile(r".*[a-z]"), re.compile(r".*[0134578@$!|€]")  # to the last one of a token
_SIGN = r",:;!?\"(){}%$\[\].*_\-/|+~=^`#&<>\\"  # what may stand inside a word, beside every sign beyond ASCII
_BEFORE, _BEHIND = r"(?:(?<=[a-z])|(?<=[a-z][013457@$]))", r"(?=[a-z]|[013457@$][a-z])"  # of a sign inside a word
_SPLIT = re.compile(rf"{_BEFORE}(?:(?:[{_SIGN}]|[^\x00-\x7f\w\s’])+|['’](?!s\b)){_BEHIND}")  # wea-pon, but not the weapon's
# What a rule needs to have anything to do: these are quick, the rules are not.
_ANY_SIGN = rf"(?:[0134578@$!€'{_SIGN}]|[^\x00-\x7f\w\s])"
_ODD = re.compile(rf"(?<!\S)(?:(?!{_ANY_SIGN})\S)*+{_ANY_SIGN}[^\sa-z]*+[a-z]")  # from the beginning of a token on: linear
_ODD_END = re.compile(r"(?<!\S)[^\s0134578@$!|€]*+[0134578@$!|€][^\sa-z]*+[a-z]")  # of the text read backwards
_SINGLES = re.compile(r"(?<!\S)(?:[a-z] \S [a-z]|[a-z] [a-z] \S|\S [a-z] [a-z])(?!\S)")  # of the plain reading
_LONG = re.compile(r"([a-z])\1{2,}")
_DOUBLED = re.compile(r"(?<![a-z])(?:([a-z])\1){3,}(?![a-z])")  # wweeaappoonn; a word with some doubled letters: `WordList`
_ONE = r"[a-z0-9@$!]"
_RUN = rf"{_ONE}( |(?: ?[.*_\-/|+,~] ?)){_ONE}(?:\1{_ONE})+(?![a-z0-9])"
_SPACED = re.compile(rf"(?<![a-z0-9]){_RUN}")  # n a k e d; n.a.k.e.d
_SPACED_AFTER_ARTICLE = re.compile(rf"(?<=a ){_RUN}")  # a n u d e figure
_BETWEEN = re.compile(r"[^a-z0-9@$!]+")
REMEMBERED = 24  # characters of a token at most


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
        return " ".join(text.translate(_WORDS).split())
    return _NO_LETTER.sub(" ", _lower(text)).strip()


def readings(prompt: str) -> list[str]:
    """The plain reading (`fold`), then those that differ: leetspeak as letters, spaced-out, split and drawn-out words mended."""
    found: list[str] = []
    quick = prompt.isascii() and not _CONTROL.search(prompt) and not may_have_pieces(prompt)
    for text in [_lower(prompt)] if quick else map("".join, _writings(prompt)):
        found.append(plain := fold(text))
        if not (
            _ODD.search(text)
            or _ODD_END.search(text[::-1])
            or _LONG.search(text)
            or _DOUBLED.search(text)
            or _SINGLES.search(plain)
        ):
            continue  # nothing in it that a rule could change: most prompts, so it must be quick
        for tokens in (text.split(), *([token for token, _, _ in writing] for writing in _mended(text))):
            found += [" ".join(filter(None, words)) for words in _spelled(tokens)]
    return list(dict.fromkeys(found))


def views(prompt: str) -> Iterator[View]:
    """The same readings with the place of every character, distinct and in the same order; slower."""
    seen = set()
    for chars in _writings(prompt):
        text = "".join(chars)
        origin = [index for index, folded in enumerate(chars) for _ in folded]
        for tokens in (_tokens(text, 0, len(text)), *_mended(text)):
            for words in _spelled([token for token, _, _ in tokens]):
                view = _view(words, tokens, text, origin)
                if view.text not in seen:
                    seen.add(view.text)
                    yield view


def clean(prompt: str) -> str:
    """For an encoder: invisible characters out, width and look-alikes undone, punctuation and accents kept, spaces single."""
    if prompt.isascii() and not _CONTROL.search(prompt):
        return " ".join(prompt.split())
    words = []
    for word in unicodedata.normalize("NFKC", prompt).split():
        visible = "".join(char for char in word if not _invisible(char))
        words.append(_lower(visible) if _mixed_script(visible) else visible)
    return " ".join(words)


def _writings(prompt: str) -> Iterator[list[str]]:
    """Folded characters, one entry per character of the prompt; then, if there are unseen ones, with spaces for them.

    Where some of them are as wide as a letter, a further writing has spaces for these alone. The last ones have nothing for what
    stands between the pieces of words.
    """
    yield (plain := list(map(_fold_one, prompt)))
    unseen = set(filter(is_unseen, prompt))
    for spaces in (unseen, {char for char in unseen if ord(char) in WIDE}):
        if spaces:
            yield [" " if char in spaces else folded for char, folded in zip(prompt, plain)]
    for dropped in between_pieces(prompt, plain):
        yield ["" if place in dropped else folded for place, folded in enumerate(plain)]


def _lower(text: str) -> str:
    """Folded character by character; punctuation stays, every white space is a space."""
    return text.translate(_LOWER) if text.isascii() else "".join(map(_fold_one, text))


@lru_cache(maxsize=4096)
def _fold_one(char: str) -> str:
    """Zero or more folded characters. Marks and format characters give none; anything that is not a letter or digit is kept."""
    out = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", char)).casefold().translate(LOOKALIKES)
    space = " " if char.isspace() else "'"  # NFKC takes an accent by itself, such as ´, for a space with a mark
    return "".join(space if one.isspace() else one for one in out if not _invisible(one))


def _invisible(char: str) -> bool:
    return is_unseen(char) or unicodedata.category(char) in ("Mn", "Me")


def _mixed_script(word: str) -> bool:
    """A word of Latin and other letters, or of other letters that all look Latin: a sign of hiding."""
    letters = [char for char in word if char.isalpha()]
    foreign = [char for char in letters if not unicodedata.normalize("NFKD", char)[0].isascii()]
    return bool(foreign) and _lower("".join(letters)).isascii()


Token = tuple[str, int, int]  # what is read, and where it stands in the folded text


def _tokens(text: str, start: int, end: int) -> list[Token]:
    return [(match[0], *match.span()) for match in _TOKEN.finditer(text, start, end)]


def _mended(text: str) -> Iterator[list[Token]]:
    """The text with its spaced-out runs as words; and with the signs in them read as letters, but still spaced out (`WordList`)."""
    if not _SINGLES.search(fold(text)):
        return
    for pattern, render in ((_SPACED, _joined), (_SPACED_AFTER_ARTICLE, _joined), (_SPACED, _letters)):
        if pattern.search(text):
            yield _with_runs(text, pattern, render)


def _with_runs(text: str, pattern: re.Pattern[str], render: Callable[[str], str]) -> list[Token]:
    tokens: list[Token] = []
    last = 0
    for match in pattern.finditer(text):
        tokens += [*_tokens(text, last, match.start()), (render(match[0]), *match.span())]
        last = match.end()
    return tokens + _tokens(text, last, len(text))


def _joined(run: str) -> str:
    return _BETWEEN.sub("", run)


def _letters(run: str) -> str:
    return " ".join(_joined(run)).translate(LEET["i"])


def _spelled(tokens: Sequence[str]) -> Iterator[list[str]]:
    """Words of every token, rule by rule (`_spellings`), the plain ones first; only rules that change something new."""
    spell = _remembered if max(map(len, tokens), default=0) <= REMEMBERED else _spellings  # long ones would fill the memory
    every = list(map(spell, tokens))
    plain = [spellings[0] for spellings in every]
    yield plain
    if max(map(len, every), default=1) == 1:
        return
    odd = [i for i, spellings in enumerate(every) if len(spellings) > 1]
    seen = {tuple(plain[i] for i in odd)}
    for rule in zip(*(every[i] for i in odd)):
        if rule not in seen:
            seen.add(rule)
            words = plain.copy()
            for i, word in zip(odd, rule):
                words[i] = word
            yield words


def _spellings(token: str) -> tuple[str, ...]:
    """The words of a token, folded, by each rule in turn; one alone if no rule changes any."""
    found = []
    for base in (token, _SPLIT.sub("", token)):
        found.append(base)
        for one in "il":
            leet = unleet(base, LEET[one])
            found += [leet, _LONG.sub(r"\1", leet), _LONG.sub(r"\1\1", leet), _DOUBLED.sub(lambda run: run[0][::2], leet)]
    words = tuple(_NO_LETTER.sub(" ", spelling).strip() for spelling in found)
    return words if len(set(words)) > 1 else words[:1]


def unleet(token: str, letters: dict[int, int]) -> str:
    """Signs as letters in each run of both from which on there are a letter and a sign: "n4k3d", not "1950". Linear in length."""
    ends = [found.end() if (found := pattern.match(token)) else 0 for pattern in (_TO_LETTER, _TO_SIGN)]
    return _LEET_RUN.sub(lambda run: run[0].translate(letters) if run.start() < min(ends) else run[0], token)


_remembered = lru_cache(maxsize=1 << 15)(_spellings)


def _view(words: Sequence[str], tokens: Sequence[Token], text: str, origin: Sequence[int]) -> View:
    """Letters are matched to the token's own one by one where there are as many, else the word is as wide as its token."""
    chars, places = [" "], [0]
    for word, (_, start, end) in zip(words, tokens):
        if not word:
            continue
        own = [i for i in range(start, end) if text[i].isalnum()]
        if len(own) != len(word) - word.count(" "):
            last = end - len(text[start:end]) + len(text[start:end].rstrip(".,;:?!)]}\"'"))
            own = [min(start + i, last - 1) for i in range(len(word) - 1)] + [last - 1]
        following = iter(own)
        for char in word:
            chars.append(char)
            places.append(places[-1] if char == " " else origin[next(following)])
        chars.append(" ")
        places.append(places[-1])
    return View("".join(chars), tuple(places))
