"""What paired prompts teach: which words of the unsafe one must change, as few as possible, and what stands in their place.

A safe prompt that was written freely changes more than it must. So of the words that it changed only the smallest set
counts whose removal makes the rest harmless to a scorer; the other changed words are left open.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from jaxtyping import Float

from valign.data.prompts.pairs import LabelledPrompt
from valign.models.heads.edit_model import form, without, words_of
from valign.progress import track
from valign.text import fold
from valign.text.function_words import FUNCTION_WORDS

MOST_CHANGES = 6  # words of a prompt that may have to change
CHUNK = 128  # prompts whose variants are scored together
Risk = Callable[[Sequence[str]], Float[np.ndarray, " text"]]  # above 0: harmful


@dataclass(frozen=True)
class EditExample:
    """A prompt and what is known of each of its words."""

    id: str
    prompt: str
    category: str  # of the harm; "" for a harmless prompt
    change: tuple[bool, ...]  # per word: it must change
    open: tuple[bool, ...]  # per word: the safe prompt has another one, but it need not change
    gone: tuple[bool, ...]  # per word: it must change, and the safe prompt has nothing in its place
    instead: tuple[str, ...]  # per word: the safe prompt's word, "" if it has none of that form there


@dataclass(frozen=True)
class Alignment:
    """Per word: the safe prompt lacks it there; it has nothing in its place; its word in that place, "" if none fits."""

    changed: list[bool]
    gone: list[bool]
    instead: list[str]


def aligned(prompt: str, partner: str) -> Alignment:
    ours, theirs = words_of(prompt), words_of(partner)
    changed, gone, instead = [False] * len(ours), [False] * len(ours), [""] * len(ours)
    matcher = difflib.SequenceMatcher(a=[fold(word) for word in ours], b=[fold(word) for word in theirs], autojunk=False)
    for kind, first, last, other, end in matcher.get_opcodes():
        if kind in ("replace", "delete"):
            changed[first:last] = [True] * (last - first)
            gone[first:last] = [kind == "delete"] * (last - first)
            instead[first:last] = matched(ours[first:last], theirs[other:end])
    return Alignment(changed, gone, instead)


def matched(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """For each of our words the one of theirs in its place: one by one where there are as many, else the next of the same form."""
    if len(ours) == len(theirs):
        return list(theirs)
    found, place = [], 0
    for word in ours:
        same = next((i for i in range(place, len(theirs)) if _kind(theirs[i]) == _kind(word)), None)
        found.append("" if same is None else theirs[same])
        place = place if same is None else same + 1
    return found


def _kind(word: str) -> str:
    """A function word itself, else the form."""
    text = fold(word)
    return text if text in FUNCTION_WORDS else f"-{form(text)}"


def smallest_changes(prompts: Sequence[str], among: Sequence[Sequence[bool]], risk: Risk) -> list[tuple[int, ...] | None]:
    """Per prompt the words, by number, that must go for the rest to be harmless; None where `MOST_CHANGES` are not enough.

    Content words marked in ``among`` are tried in the order of what leaving each out alone saves; sets grow word by word, so that
    words which carry a harm only together are found together.
    """
    alone, owner = [], []
    for number, prompt in enumerate(prompts):
        for place, word in enumerate(words_of(prompt)):
            if among[number][place] and fold(word) not in FUNCTION_WORDS:
                alone.append(without(prompt, [place]))
                owner.append((number, place))
    scores = risk(alone) if alone else np.zeros(0)
    order: list[list[int]] = [[] for _ in prompts]
    for (number, place), _ in sorted(zip(owner, scores), key=lambda one: float(one[1])):
        order[number].append(place)
    sets = [(number, places[:size]) for number, places in enumerate(order) for size in range(1, min(len(places), MOST_CHANGES) + 1)]
    left = risk([without(prompts[number], places) for number, places in sets]) if sets else np.zeros(0)
    found: list[tuple[int, ...] | None] = [None] * len(prompts)
    for (number, places), score in zip(sets, left):
        if found[number] is None and score <= 0:
            found[number] = tuple(sorted(places))
    return found


def examples(rows: Sequence[LabelledPrompt], risk: Risk, *, most: int, seed: int) -> list[EditExample]:
    """One per pair; those whose unsafe prompt no few words make harmless are left out.

    Args: most: Prompts that are looked at, drawn by the seed.
    """
    partners = {row.pair: row.prompt for row in rows if row.pair and row.label == 0}
    unsafe = [row for row in rows if row.label == 1 and row.pair in partners]
    unsafe = Random(seed).sample(unsafe, min(most, len(unsafe)))
    found = []
    for begin in track(range(0, len(unsafe), CHUNK), "find the words that must change"):
        chunk = unsafe[begin : begin + CHUNK]
        pairs = [aligned(row.prompt, partners[row.pair]) for row in chunk]
        sets = smallest_changes([row.prompt for row in chunk], [pair.changed for pair in pairs], risk)
        for row, pair, places in zip(chunk, pairs, sets):
            if places:
                must = tuple(place in places for place in range(len(pair.changed)))
                loose = tuple(one and not two for one, two in zip(pair.changed, must))
                gone = tuple(one and two for one, two in zip(must, pair.gone))
                category = row.categories[0] if row.categories else ""
                found.append(EditExample(row.id, row.prompt, category, must, loose, gone, tuple(pair.instead)))
    return found
