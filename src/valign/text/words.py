"""A set of words and phrases, found all at once in a folded text (Aho-Corasick), also spaced out, cut or with double letters."""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

import ahocorasick

from valign.text.spelling import fold

# Words of one or two letters: beside them stands another word, not the rest of one that was cut.
LITTLE = frozenset({
    "a", "i", "ad", "ah", "am", "an", "as", "at", "ax", "be", "by", "do", "ed", "eh", "er", "ex", "fa", "go", "ha",
    "he", "hi", "hm", "ho", "id", "if", "in", "is", "it", "la", "lo", "ma", "me", "mr", "ms", "mu", "my", "no", "of",
    "oh", "ok", "on", "or", "ow", "ox", "pa", "pi", "re", "sh", "so", "ti", "to", "uh", "um", "up", "us", "we", "ye",
    "yo",
})  # fmt: skip

# English words that are other English words with a letter doubled: they are meant as they are written.
DOUBLED = frozenset({
    "abbott", "access", "addition", "allan", "allison", "barre", "barred", "barron", "bella", "bleed", "boone", "booth",
    "breed", "brett", "brooke", "cameroon", "cancelled", "canning", "cannon", "cannons", "caress", "carroll", "carry", "cheer",
    "choose", "comma", "commas", "commune", "cooke", "cooped", "coops", "cutter", "denny", "dessert", "desserts", "dinner",
    "dinners", "discuss", "donna", "doomed", "dragoons", "dunne", "eerie", "fiancee", "filled", "filler", "filling", "finnish",
    "forrest", "freed", "furry", "garry", "goods", "gripped", "gripping", "groove", "grooves", "halle", "hoffmann", "holly",
    "hooped", "hooping", "hoops", "hopped", "hopping", "labelled", "latter", "litter", "loose", "looser", "losses", "manny",
    "marry", "matter", "medallist", "meets", "michelle", "modelled", "modelling", "mohammed", "moons", "moore", "mopped",
    "mopping", "pilled", "pinned", "planned", "planner", "planning", "polled", "polly", "poole", "pooled", "posse", "possess",
    "princess", "proof", "ragged", "rapped", "rapper", "rappers", "rapping", "refugee", "renee", "ridding", "robbed", "robber",
    "rooster", "roosters", "saloon", "saloons", "scarlett", "scarred", "scarring", "scoops", "scrapped", "scrapping", "shoot",
    "shoots", "sienna", "signalling", "slopping", "snipped", "somme", "sonny", "speed", "starred", "starring",
    "steep", "still", "stooped", "stripped", "stripping", "supper", "suppers", "swooped", "tapped", "tapping", "teens",
    "tilled", "tiller", "tonnes", "torre", "travelled", "traveller", "travellers", "travelling", "trees", "trooped",
    "valle", "villa", "ville", "wagging", "winner", "winners", "wolff",
})  # fmt: skip
_RUN = re.compile(r"([a-z])\1*|[^a-z]")  # equal letters, or another sign


fold_term = lru_cache(maxsize=65536)(fold)  # of lists, which are folded anew for every variant of a policy; never of prompts


class WordList:
    """Whole words only: "sex" does not match "Essex". Terms are folded; blank ones are refused.

    Also found: a word of five letters or more of which one or two were cut off ("na ked"), unless the piece is a word itself ("be
    heading"); and a term letter by letter ("n a k e d m a n"). Where such letters go on, the borders of words are unknown: a
    term of five letters counts wherever it stands in them, a term of four at one of their ends, a shorter one only by itself.
    And a term with letters doubled ("nakked"), of words with three different letters in a row two of them ("seexx"; "soon" is not
    "son"), unless the doubled word is one that English has (`DOUBLED`).
    """

    def __init__(self, terms: Iterable[str], *, exact: bool = False) -> None:
        """``exact``: words as they are written and nothing else, for languages in which a letter more is another word."""
        self.terms = frozenset(map(fold, terms))
        if not self.terms or "" in self.terms:
            raise ValueError(f"WordList.terms must be words, got {len(self.terms)} with a blank one or none. Remove it.")
        written = {} if exact else {" ".join(term.replace(" ", "")): (term, True) for term in sorted(self.terms)}
        written |= {} if exact else {pieces: (term, False) for term in sorted(self.terms) for pieces in _cut(term)}
        written |= {term: (term, False) for term in self.terms}
        self._automaton = ahocorasick.Automaton()
        for text, (term, spaced) in written.items():
            self._automaton.add_word(f" {text} ", (len(text), term, spaced and len(text) > 1))
        self._automaton.make_automaton()
        self._exact = exact
        undoubled: dict[str, list[str]] = {}
        for term in sorted(self.terms if not exact else ()):
            undoubled.setdefault(_undoubled(term), []).append(term)
        self._undoubled = ahocorasick.Automaton()
        for text, terms in undoubled.items():
            self._undoubled.add_word(f" {text} ", (len(text), terms))
        self._undoubled.make_automaton()

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
        short = text if self._exact else _undoubled(text)
        if len(short) == len(text):
            return
        places: list[int] = []  # in the text, of every character of the shorter one
        for end, (length, terms) in self._undoubled.iter(short):
            places = places or [match.start() for match in _RUN.finditer(text)]
            start, stop = places[end - length], places[end]
            yield from ((start, stop, term) for term in terms if _is_doubled(text[start:stop], term))


@lru_cache(maxsize=256)  # every list of a policy is asked about the same few texts
def _undoubled(text: str) -> str:
    """One letter for each run of equal ones."""
    return _RUN.sub(lambda run: run[0][0], text)


def _is_doubled(text: str, term: str) -> bool:
    """Whether the text is the term with letters doubled, each of its words by the rule of `WordList`."""
    if text == term:
        return False
    for word, meant in zip(text.split(" "), term.split(" "), strict=True):
        runs = [(len(own[0]), len(other[0])) for own, other in zip(_RUN.finditer(word), _RUN.finditer(meant), strict=True)]
        longer = sum(own > other for own, other in runs)
        if any(own < other for own, other in runs) or (longer and (word in DOUBLED or len(runs) < 3 or longer < 5 - len(runs))):
            return False
    return True


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
