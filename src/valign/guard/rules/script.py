"""Blocks prompts that hold words in letters other than Latin ones, which the word lists and the encoder cannot read.

Words are judged one by one and before look-alike letters are folded, so that neither an English tail nor letters that look Latin
make a foreign request readable.
"""

import unicodedata
from collections.abc import Iterator, Sequence

from valign.guard.records import Verdict
from valign.policy import Policy
from valign.text import fold
from valign.text.words import fold_term

LAST_LATIN = 0x24F  # last letter of Unicode's block Latin Extended-B
FIRST_EAST_ASIAN = 0x2E80  # from here on one letter can be a word: Chinese, Japanese and Korean
SCRIPTS = {"ru": "CYRILLIC"}  # of the languages with lists that are not written in Latin letters, as Unicode names it
SPELT = 3  # single letters in a row, from which they are a word that is spelt out


class ScriptStage:
    """Fires on the first word that cannot be read; the verdict's score is the number of such words."""

    name = "script"
    level = "rule"

    def __init__(self, policy: Policy) -> None:
        self._action = policy.guard.other_scripts
        judged = {code for code, choice in policy.guard.languages.each.items() if choice == "lists"}
        self._scripts = tuple(SCRIPTS[code] for code in sorted(judged & set(SCRIPTS))) if self._action == "lists" else ()
        self._listed = listed_words(policy)

    def check(self, prompt: str) -> Verdict:
        if prompt.isascii():
            return Verdict(stage=self.name, level="rule")
        unread = [word for word in words(prompt) if not (readable(word) or fold(word) in self._listed or self._is_judged(word))]
        if not unread or self._action == "allow":
            return Verdict(stage=self.name, level="rule", score=len(unread), threshold=1)
        message = "letters that this policy cannot read"
        return Verdict(
            stage=self.name, level="rule", outcome="fire", score=len(unread), threshold=1, message=message, action="block"
        )

    def _is_judged(self, word: str) -> bool:
        """Whether the word is in a script whose language has lists of its own."""
        return any(all(unicodedata.name(char, "").startswith(script) for char in word) for script in self._scripts)

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        return [self.check(prompt) for prompt in prompts]


def listed_words(policy: Policy) -> frozenset[str]:
    """Every word of the policy's lists, folded. One that is written in look-alike letters is left to its list, which finds it."""
    concepts = [concept for category in policy.categories for concept in category.concepts]
    texts = [text for category in policy.categories for text in category.terms]
    texts += [text for concept in concepts for text in (concept.name, *concept.paraphrases, *concept.terms)]
    texts += [text for rule in policy.always_block for terms in rule.every for text in terms]
    for norm in policy.norms:
        texts += [*norm.when.context, *norm.when.behaviour, *norm.when.purpose]
    return frozenset(word for text in texts for word in fold_term(text).split())


def words(prompt: str) -> Iterator[str]:
    """Letters between spaces, punctuation and signs, without marks and digits; `SPELT` single letters in a row are one word."""
    singles: list[str] = []
    for word in _split(prompt):
        if len(word) > 1:
            yield from _spelt(singles)
            singles = []
            yield word
        else:
            singles.append(word)
    yield from _spelt(singles)


def readable(word: str) -> bool:
    """Whether a word's letters can be read as Latin ones.

    One foreign letter can be (a formula's, or a look-alike), unless it is a word by itself as in Chinese. So can look-alikes among
    Latin letters, which hide an English word. Foreign letters only, or several of which one looks like no Latin letter, cannot.
    """
    foreign = [char for char in word if _foreign(char)]
    if any(ord(char) >= FIRST_EAST_ASIAN for char in foreign):
        return False
    if len(foreign) < 2:
        return True
    return len(foreign) < len(word) and not any(_beyond(fold(char)) for char in foreign)


def _split(prompt: str) -> Iterator[str]:
    word = ""
    for char in unicodedata.normalize("NFKC", prompt):
        kind = unicodedata.category(char)
        if kind[0] == "L":
            word += char
        elif kind[0] in "ZPS" or kind == "Cc":
            if word:
                yield word
            word = ""
    if word:
        yield word


def _spelt(letters: Sequence[str]) -> Iterator[str]:
    if len(letters) >= SPELT:
        yield "".join(letters)
    else:
        yield from letters


def _foreign(char: str) -> bool:
    return _beyond(unicodedata.normalize("NFKD", char).casefold())


def _beyond(text: str) -> bool:
    return any(char.isalpha() and ord(char) > LAST_LATIN for char in text)
