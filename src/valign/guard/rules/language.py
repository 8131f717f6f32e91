"""Prompts in other languages: judged by that language's own lists, translated by a chat model, or held back with a message.

The rules for English read every prompt as well. A language is never taken for granted: the lists of every language that the prompt
may be in are looked at, since the guess for a few words is often wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from valign.guard.records import Verdict
from valign.policy import Policy
from valign.policy.word_lists import expanded, language_words
from valign.text import WordList, fold, readings
from valign.text.languages import languages_of
from valign.text.words import fold_term

POSSIBLE = 0.05  # probability from which a language's lists are looked at
SURE = 0.75  # probability from which a prompt is in a language, and English is no longer possible
FEWEST_WORDS = 4  # of a prompt whose language can be sure
OWN = "en"
MINORS = "minors-sexual"  # the rule that every language's words for minors belong to
Translate = Callable[[str, str], str]  # text, code of its language -> English


@dataclass(frozen=True)
class _Lists:
    name: str
    harm: tuple[tuple[str, WordList], ...]  # category, words
    minors: WordList
    harmless: WordList | None


class LanguageStage:
    """Fires on a listed word of a possible language, and on a prompt in a language that the policy holds back.

    Args: translate: By a chat model; None holds back what the policy wants translated.
    """

    name = "language"
    level = "language"

    def __init__(self, policy: Policy, translate: Translate | None = None) -> None:
        rules = policy.guard.languages
        self._each, self._other = dict(rules.each), rules.other
        self._translate = translate
        self._lists = {code: _lists(code, policy.category_ids()) for code, choice in self._each.items() if choice == "lists"}
        texts = [term for category in policy.categories for term in category.terms]
        texts += [term for category in policy.categories for concept in category.concepts for term in concept.terms]
        self._own_terms = frozenset(map(fold_term, texts))
        self._blocks_minors = any(rule.id == MINORS for rule in policy.always_block)
        self._english = lru_cache(maxsize=256)(self._translated)
        self._asks = self._other != "allow" or bool(self._each)

    def check(self, prompt: str) -> Verdict:
        if not self._asks:
            return Verdict(stage=self.name, level="language")
        found = languages_of(prompt)
        possible = [lists for code, lists in self._lists.items() if found.get(code, 0.0) >= POSSIBLE]
        surely = self.foreign(prompt, found)
        for lists in possible:
            if (verdict := self._listed(prompt, lists, possible, english=not surely)) is not None:
                return verdict
        choice = self._each.get(surely, self._other) if surely else "allow"
        if choice == "hold":
            return self._held(surely, "which this policy does not judge")
        if choice == "translate" and self._english(prompt, surely) is None:
            return self._held(surely, "and no chat model translated it")
        said = {"lists": f"judged by the lists for {surely}", "translate": f"translated from {surely}"}.get(choice, "")
        return Verdict(stage=self.name, level="language", message=said)

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        return [self.check(prompt) for prompt in prompts]

    def translation(self, prompt: str) -> str | None:
        """The prompt in English, to be judged as well; None where it is English, or the policy wants no translation."""
        if "translate" not in (*self._each.values(), self._other):
            return None
        code = self.foreign(prompt, languages_of(prompt))
        return self._english(prompt, code) if code and self._each.get(code, self._other) == "translate" else None

    def foreign(self, prompt: str, found: dict[str, float]) -> str:
        """The language that the prompt is surely in; "" where it is English, or nobody can tell."""
        best = max(found, key=lambda code: found[code], default=OWN)
        sure = found.get(best, 0.0) >= SURE and found.get(OWN, 0.0) < POSSIBLE
        return best if best != OWN and sure and len(fold(prompt).split()) >= FEWEST_WORDS else ""

    def _listed(self, prompt: str, lists: _Lists, possible: Sequence[_Lists], *, english: bool) -> Verdict | None:
        """A finding in any reading of the prompt; with a word for a minor a sexual one is blocked.

        Args:
            possible: All lists that were asked for: what is harmless in one of these languages does not count in another.
            english: Possibly so; a word that the lists for English have too ("cocaine") is then left to them.
        """
        theirs = self._own_terms if english else frozenset[str]()
        harmless = [one.harmless for one in possible if one.harmless is not None]
        categories: dict[str, None] = {}
        minors = False
        for text in readings(prompt):
            categories |= dict.fromkeys(name for name, words in lists.harm if _meant(words, harmless, theirs, text))
            minors = minors or any(one.minors.any(text) for one in possible)
        if not categories:
            return None
        if minors and "sexual" in categories and self._blocks_minors:
            message = "a rule that allows no rewrite"
            return Verdict(stage="hard-rule", level="rule", outcome="fire", rule=MINORS, action="block", message=message)
        first, *others = categories
        return Verdict(
            stage=self.name,
            level="language",
            outcome="fire",
            category=first,
            also=tuple(others),
            score=1.0,
            threshold=1.0,
            ranking=1.0,
            scores=dict.fromkeys(categories, 1.0),
            message=f"a listed {lists.name} term of {first}",
        )

    def _held(self, code: str, why: str) -> Verdict:
        known = ", ".join(sorted((OWN, *self._each)))
        message = f"the prompt reads as {code}, {why}; write it in one of {known}"
        return Verdict(stage=self.name, level="rule", outcome="fire", message=message, action="block")  # no intent excuses it

    def _translated(self, prompt: str, code: str) -> str | None:
        if self._translate is None:
            return None
        try:
            return self._translate(prompt, code) or None
        except Exception:
            return None


@lru_cache(maxsize=64)  # a safety config asks for a stage per prompt, and changes none of the lists
def _lists(code: str, categories: tuple[str, ...]) -> _Lists:
    words = language_words(code)
    harm = tuple((id, WordList(words.terms(id), exact=True)) for id in categories if words.terms(id))
    harmless = WordList(expanded(words.harmless), exact=True) if words.harmless else None
    return _Lists(words.name, harm, WordList(expanded(words.minors), exact=True), harmless)


def _meant(words: WordList, harmless: Sequence[WordList], theirs: frozenset[str], text: str) -> bool:
    """Whether a term stands in the text, but neither in the harmless phrases nor among ``theirs``."""
    text = f" {text} "
    found = [hit for hit in words.find(text) if hit[2] not in theirs]
    innocent = [hit for one in harmless for hit in one.find(text)] if found else []
    return any(not any(first <= one[0] and one[1] <= last for first, last, _ in innocent) for one in found)
