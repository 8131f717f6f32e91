"""A set of words and phrases, found all at once in a folded text (Aho-Corasick)."""

from collections.abc import Iterable, Iterator

import ahocorasick

from valign.guard.text import fold


class WordList:
    """Whole words only: "sex" is no part of "Essex". Terms are folded; blank ones are refused."""

    def __init__(self, terms: Iterable[str]) -> None:
        self.terms = frozenset(map(fold, terms))
        if not self.terms or "" in self.terms:
            raise ValueError(f"WordList.terms must be words, got {len(self.terms)} with a blank one or none. Remove it.")
        self._automaton = ahocorasick.Automaton()
        for term in self.terms:
            self._automaton.add_word(f" {term} ", term)
        self._automaton.make_automaton()

    def any(self, text: str) -> bool:
        """Whether the folded text holds a term."""
        return next(self._automaton.iter(f" {text} "), None) is not None

    def find(self, text: str) -> Iterator[tuple[int, str]]:
        """``(start, term)`` in a `View`'s text (spaces at both ends), by start, the longest first."""
        found = [(end - len(term), term) for end, term in self._automaton.iter(text)]
        yield from sorted(found, key=lambda hit: (hit[0], -len(hit[1])))
