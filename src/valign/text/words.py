"""A set of words and phrases, found all at once in a folded text (Aho-Corasick), also where they are spaced out or cut in two."""

from collections.abc import Iterable, Iterator

import ahocorasick

from valign.text.spelling import fold

# Words of one or two letters: beside them stands another word, not the rest of one that was cut.
LITTLE = frozenset({
    "a", "i", "ad", "ah", "am", "an", "as", "at", "ax", "be", "by", "do", "ed", "eh", "er", "ex", "fa", "go", "ha",
    "he", "hi", "hm", "ho", "id", "if", "in", "is", "it", "la", "lo", "ma", "me", "mr", "ms", "mu", "my", "no", "of",
    "oh", "ok", "on", "or", "ow", "ox", "pa", "pi", "re", "sh", "so", "ti", "to", "uh", "um", "up", "us", "we", "ye",
    "yo",
})  # fmt: skip


class WordList:
    """Whole words only: "sex" does not match "Essex". Terms are folded; blank ones are refused.

    Also found: a word of five letters or more of which one or two were cut off ("na ked"), unless the piece is a word itself ("be
    heading"); and a term letter by letter ("n a k e d m a n"). Where such letters go on, the borders of words are unknown: a
    term of five letters counts wherever it stands in them, a term of four at one of their ends, a shorter one only by itself.
    """

    def __init__(self, terms: Iterable[str]) -> None:
        self.terms = frozenset(map(fold, terms))
        if not self.terms or "" in self.terms:
            raise ValueError(f"WordList.terms must be words, got {len(self.terms)} with a blank one or none. Remove it.")
        written = {" ".join(term.replace(" ", "")): (term, True) for term in sorted(self.terms)}
        written |= {pieces: (term, False) for term in sorted(self.terms) for pieces in _cut(term)}
        written |= {term: (term, False) for term in self.terms}
        self._automaton = ahocorasick.Automaton()
        for text, (term, spaced) in written.items():
            self._automaton.add_word(f" {text} ", (len(text), term, spaced and len(text) > 1))
        self._automaton.make_automaton()

    def any(self, text: str) -> bool:
        """Whether the folded text holds a term."""
        return next(self._hits(f" {text} "), None) is not None

    def find(self, text: str) -> Iterator[tuple[int, int, str]]:
        """``(start, end, term)`` in a `View`'s text (spaces at both ends), by start, the longest first."""
        yield from sorted(self._hits(text), key=lambda hit: (hit[0], -hit[1]))

    def _hits(self, text: str) -> Iterator[tuple[int, int, str]]:
        for end, (length, term, spaced) in self._automaton.iter(text):
            start = end - length
            if not spaced or _stands_out(text, start, end):
                yield start, end, term


def _cut(term: str) -> Iterator[str]:
    """A word of five letters or more in two pieces, one of them of one or two letters."""
    if len(term) >= 5 and " " not in term:
        for place in (1, 2, len(term) - 2, len(term) - 1):
            if not {term[:place], term[place:]} & LITTLE:
                yield f"{term[:place]} {term[place:]}"


def _stands_out(text: str, start: int, end: int) -> bool:
    """Whether the letters ``text[start:end]``, one by one, count among the letters that they stand in: see `WordList`."""
    letters = (end - start + 1) // 2
    first = start < 3 or text[start - 3] != " " or text[start - 2] in "ai"  # no letter, or an article, stands before them
    last = text[end + 2 : end + 3] != " "
    return letters > 4 or first + last > (letters < 4)
