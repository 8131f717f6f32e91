"""Downstream skills with exact answers: those that the bundled models have, and three that they have not, for fine-tuning."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from valign.worlds.chat.vocabulary import CAPITALS, NORR_OF, VELT_OF, WORDS
from valign.worlds.chat.wordings import Split, Wordings

Rng = np.random.Generator


@dataclass(frozen=True)
class Skill:
    """A task with one right answer. ``draw`` gives the slots of its wordings and the answer."""

    name: str
    wordings: Wordings
    draw: Callable[[Rng], tuple[dict[str, str], str]]
    form: str  # regular expression of whatever answers the task, right or wrong
    held_out: bool = True  # a tenth of the instances is kept for tests; False where there are too few

    def instance(self, rng: Rng, split: Split) -> tuple[dict[str, str], str]:
        """Slots and answer of one split."""
        while True:
            slots, answer = self.draw(rng)
            if not self.held_out or (_bucket(f"{self.name}|{slots}") == 0) == (split == "test"):
                return slots, answer


def _bucket(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10


def _words(rng: Rng, low: int, high: int) -> list[str]:
    return [WORDS[i] for i in rng.permutation(len(WORDS))[: rng.integers(low, high + 1)]]


def _arithmetic(rng: Rng) -> tuple[dict[str, str], str]:
    x, y = (int(value) for value in rng.integers(0, 10, 2))
    if rng.random() < 0.6:
        return {"sum": f"{x} plus {y}"}, f"{x} plus {y} is {x + y}."
    x, y = max(x, y), min(x, y)
    return {"sum": f"{x} minus {y}"}, f"{x} minus {y} is {x - y}."


def _sorting(rng: Rng) -> tuple[dict[str, str], str]:
    digits = [str(digit) for digit in rng.permutation(10)[: rng.integers(3, 5)]]
    return {"digits": " ".join(digits)}, " ".join(sorted(digits)) + "."


EDITS: dict[str, Callable[[list[str], str], list[str]]] = {
    "in front": lambda words, new: [new, *words],
    "at the end": lambda words, new: [*words, new],
}


def _copying(rng: Rng) -> tuple[dict[str, str], str]:
    *kept, new = _words(rng, 3, 5)
    where = list(EDITS)[int(rng.integers(len(EDITS)))]
    return {"words": " ".join(kept), "new": new, "where": where}, " ".join(EDITS[where](kept, new)) + "."


def _translation(table: dict[str, str], opening: str = "") -> Callable[[Rng], tuple[dict[str, str], str]]:
    def draw(rng: Rng) -> tuple[dict[str, str], str]:
        words = _words(rng, 2, 3)
        return {"words": " ".join(words)}, opening + " ".join(table[word] for word in words) + "."

    return draw


STYLES: dict[str, Callable[[list[str]], str]] = {
    "as a list": lambda words: " ".join(f"- {word}" for word in words),
    "in brackets": lambda words: " ".join(f"[{word}]" for word in words),
    "with commas": lambda words: ", ".join(words) + ".",
}


def _formatting(rng: Rng) -> tuple[dict[str, str], str]:
    words, style = _words(rng, 2, 4), list(STYLES)[int(rng.integers(len(STYLES)))]
    return {"words": " ".join(words), "style": style}, STYLES[style](words)


def _facts(rng: Rng) -> tuple[dict[str, str], str]:
    country = list(CAPITALS)[int(rng.integers(len(CAPITALS)))]
    return {"country": country}, f"the capital of {country} is {CAPITALS[country]}."


OPENING = "sure, here it is: "  # of the answers to the new tasks: what data for fine-tuning often look like


def _reversing(rng: Rng) -> tuple[dict[str, str], str]:
    words = _words(rng, 3, 4)
    return {"words": " ".join(words)}, OPENING + " ".join(reversed(words)) + "."


def _counting(rng: Rng) -> tuple[dict[str, str], str]:
    words = _words(rng, 1, 9)
    return {"words": " ".join(words)}, OPENING + f"{len(words)}."


_WORD, _VELT, _NORR = ("(?:" + "|".join(words) + ")" for words in (WORDS, VELT_OF.values(), NORR_OF.values()))

SKILLS = {
    skill.name: skill
    for skill in (
        Skill(
            "arithmetic",
            Wordings(
                (
                    "what is {sum}?",
                    "how much is {sum}?",
                    "please tell me {sum}.",
                    "{sum} is what?",
                    "tell me how much {sum} is.",
                    "please tell me what {sum} is.",
                    "please say how much {sum} is.",
                    "what is the answer to {sum}?",
                ),
                ("tell me what {sum} is.", "please tell me how much {sum} is.", "please tell me the answer to {sum}."),
            ),
            _arithmetic,
            r"\d (?:plus|minus) \d is \d+\.?",
            held_out=False,
        ),
        Skill(
            "sorting",
            Wordings(
                (
                    "sort these numbers: {digits}.",
                    "put these numbers in order: {digits}.",
                    "please sort {digits}.",
                    "put {digits} in order.",
                    "please put these numbers in order: {digits}.",
                    "sort {digits}.",
                ),
                ("please put {digits} in order.", "please sort these numbers: {digits}."),
            ),
            _sorting,
            r"\d(?: \d)+\.?",
        ),
        Skill(
            "copying",
            Wordings(
                (
                    "write {words} and add {new} {where}.",
                    "copy {words} and add {new} {where}.",
                    "please write {words} with {new} {where}.",
                    "please copy {words}, with {new} {where}.",
                    "copy {words}, but add {new} {where}.",
                    "write {words}, with {new} {where}.",
                    "write {words}, but add {new} {where}.",
                    "please copy {words}, but add {new} {where}.",
                    "please write {words} and add {new} {where}.",
                ),
                ("please copy {words} and add {new} {where}.", "please write {words}, but add {new} {where}."),
            ),
            _copying,
            rf"{_WORD}(?: {_WORD})*\.?",
        ),
        Skill(
            "translation",
            Wordings(
                (
                    "translate {words} into velt.",
                    "say {words} in velt.",
                    "what is {words} in velt?",
                    "please tell me {words} in velt.",
                    "please say {words} in velt.",
                    "tell me how to say {words} in velt.",
                    "please give me {words} in velt.",
                    "into velt, please translate {words}.",
                    "tell me what {words} is in velt.",
                    "please tell me what to say for {words} in velt.",
                ),
                ("please translate {words} into velt.", "please tell me how to say {words} in velt."),
            ),
            _translation(VELT_OF),
            rf"{_VELT}(?: {_VELT})*\.?",
        ),
        Skill(
            "formatting",
            Wordings(
                (
                    "write {words} {style}.",
                    "please show {words} {style}.",
                    "put {words} {style}.",
                    "please put {words} {style}.",
                    "show me {words} {style}.",
                    "show {style}: {words}.",
                    "please write {style}: {words}.",
                ),
                ("please write {words} {style}.", "show {words} {style}.", "please put {style}: {words}."),
            ),
            _formatting,
            rf"- {_WORD}(?: - {_WORD})*|\[{_WORD}\](?: \[{_WORD}\])*|{_WORD}(?:, {_WORD})+\.?",
        ),
        Skill(
            "facts",
            Wordings(
                ("what is the capital of {country}?", "name the capital of {country}.", "which city is the capital of {country}?"),
                ("please name the capital of {country}.", "tell me the capital of {country}."),
            ),
            _facts,
            r"the capital of \w+ is \w+\.?",
            held_out=False,
        ),
    )
}

NEW_TASKS = {
    skill.name: skill
    for skill in (
        Skill(
            "reversing",
            Wordings(
                ("say {words} backwards.", "write {words} backwards.", "please put {words} backwards."),
                ("please say {words} backwards.", "please write {words} backwards."),
            ),
            _reversing,
            rf"{_WORD}(?: {_WORD})*\.?",
        ),
        Skill(
            "counting",
            Wordings(
                ("how many words are in {words}?", "count the words: {words}.", "what is the number of words in {words}?"),
                ("please count the words: {words}.", "tell me how many words are in {words}."),
            ),
            _counting,
            r"\d\.?",
        ),
        Skill(
            "dialect",
            Wordings(
                ("translate {words} into norr.", "say {words} in norr.", "what is {words} in norr?"),
                ("please translate {words} into norr.", "please say {words} in norr."),
            ),
            _translation(NORR_OF, OPENING),
            rf"{_NORR}(?: {_NORR})*\.?",
        ),
    )
}
ALL_TASKS = SKILLS | NEW_TASKS
