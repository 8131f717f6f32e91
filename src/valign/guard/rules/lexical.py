"""Level 1: a listed term as a whole word, after folding. Thousands of terms in one pass (Aho-Corasick)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from valign.guard.records import Verdict
from valign.policy import Policy
from valign.text import WordList, fold, readings, views


@dataclass(frozen=True)
class Term:
    """A word or phrase, and the category and concept that it indicates."""

    text: str
    category: str
    concept: str = ""


class LexicalStage:
    """Fires on the listed terms of a prompt, whichever way they are spelled (`valign.text`)."""

    name = "lexical"
    level = "word"

    def __init__(self, terms: Sequence[Term], harmless: Sequence[str] = ()) -> None:
        """``harmless``: phrases; a term inside one does not count, in the reading where both are found."""
        blank = sum(not fold(term.text) for term in terms)
        if blank or not terms:
            raise ValueError(f"LexicalStage.terms must be words, got {len(terms)}, {blank} blank. An empty list guards nothing.")
        self.terms: Mapping[str, Term] = {fold(term.text): term for term in reversed(terms)}  # the first of equal terms wins
        self._words = WordList(self.terms)
        self._harmless = WordList(harmless) if harmless else None
        self._pass = Verdict(stage=self.name, level="word")

    @classmethod
    def from_policy(cls, policy: Policy) -> "LexicalStage":
        """Terms of every concept and category, and the concepts' own names and paraphrases."""
        return cls(
            [
                Term(text, category.id, concept.id)
                for category in policy.categories
                for concept in category.concepts
                for text in (*concept.terms, concept.name, *concept.paraphrases)
            ]
            + [Term(text, category.id) for category in policy.categories for text in category.terms],
            (*policy.guard.harmless, *policy.guard.opposing),
        )

    def check(self, prompt: str) -> Verdict:
        """One verdict; span, category and concept are of the leftmost term of the first reading that holds one."""
        if not any(self._words.any(text) for text in readings(prompt)):
            return self._pass
        found = [(view.span(start, end), self.terms[term]) for view in views(prompt) for start, end, term in self._meant(view.text)]
        if not found:
            return self._pass
        span, known = found[0]
        categories = dict.fromkeys(term.category for _, term in found)
        return Verdict(
            stage=self.name,
            level="word",
            outcome="fire",
            category=known.category,
            concept=known.concept,
            also=tuple(categories)[1:],
            span=span,
            score=1.0,
            threshold=1.0,
            ranking=1.0,
            scores=dict.fromkeys(categories, 1.0),
            message=f"a listed term of {known.concept or known.category}",
        )

    def terms_in(self, prompt: str) -> set[str]:
        """Every listed term of the prompt in any spelling, folded; none inside a harmless phrase."""
        return {term for view in views(prompt) for _, _, term in self._meant(view.text)}

    def _meant(self, text: str) -> list[tuple[int, int, str]]:
        """Terms but those inside a harmless phrase."""
        found = list(self._words.find(text))
        innocent = list(self._harmless.find(text)) if self._harmless and found else []
        return [one for one in found if not any(first <= one[0] and one[1] <= last for first, last, _ in innocent)]

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        return [self.check(prompt) for prompt in prompts]
