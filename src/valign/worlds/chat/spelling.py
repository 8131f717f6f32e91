"""Misspellings that people use to pass word lists, and the way back from them: every disguise of the world's words is known."""

from functools import cache

import numpy as np

from valign.worlds.chat.vocabulary import ACTS, THINGS

LEET = str.maketrans("aeio", "4310")
WAYS = 3  # figures for letters, dashes between letters, a doubled letter


def disguise(word: str, rng: np.random.Generator) -> str:
    """The word with figures for letters, with dashes between its letters, or with one letter doubled."""
    made = disguises(word)
    return made[int(rng.integers(len(made)))]


@cache
def disguises(word: str) -> tuple[str, ...]:
    """All its disguises, without those that are words of the world themselves, such as the word itself."""
    ways = [word.translate(LEET), "-".join(word), word[:2] + word[1] + word[2:], word[:-1] + word[-2:]]
    return tuple(dict.fromkeys(way for way in ways if way not in _words()))


@cache
def _words() -> frozenset[str]:
    return frozenset([*THINGS, *ACTS, *(act.ing for act in ACTS.values())])


@cache
def _plain() -> dict[str, str]:
    return {way: word for word in sorted(_words()) for way in disguises(word)}


def undisguise(text: str) -> str:
    """The text in lower case with every disguised word of the world in its plain spelling."""
    return " ".join(_undisguise(word) for word in text.lower().split())


def _undisguise(word: str) -> str:
    core = word.strip(".,:;?!\"'()")
    plain = _plain().get(core)
    return word if plain is None else word.replace(core, plain)
