"""Rewriting by small changes, from the policy's words alone: a concept's name or a norm's act, where it stands, gives way to its
counterpart."""

from collections.abc import Iterable, Iterator

from valign.guard.rewriting.changes import Change, proposed
from valign.guard.rewriting.policy_rewriter import RewriteRequest
from valign.policy import Policy
from valign.text import WordList, fold, views


class PolicyEditor:
    """One proposal, or none: for harm the longest name or paraphrase of a concept that stands in the prompt, for a broken norm the
    act, without the purpose."""

    name = "edit"
    uses_chat = False

    def __init__(self, policy: Policy) -> None:
        self._norms = {norm.id: norm for norm in policy.norms}
        concepts = [concept for category in policy.categories for concept in category.concepts]
        self._safe = {fold(name): concept.safe for concept in reversed(concepts) for name in (*concept.paraphrases, concept.name)}
        self._names = WordList(self._safe)
        acts = [act for norm in policy.norms for act in norm.when.behaviour]
        self._acts = WordList(acts) if acts else None
        purposes = [phrase for norm in policy.norms for phrase in norm.when.purpose]
        self._purposes = WordList(purposes) if purposes else None

    def proposals(self, request: RewriteRequest) -> Iterator[str]:
        if request.role == "sign":
            return
        by_norm = request.role == "values"
        text = proposed(request, lambda part: self._by_norm(part, request.finding.rule) if by_norm else self._by_name(part))
        if text is not None:
            yield text

    def _by_name(self, text: str) -> list[Change]:
        found = max(_found(self._names, text), key=lambda one: one[1] - one[0], default=None)
        return [] if found is None else [(found[0], found[1], self._safe[found[2]])]

    def _by_norm(self, text: str, id: str) -> list[Change]:
        norm = self._norms.get(id)
        if norm is None or self._acts is None:
            return []
        acts = _apart((start, end) for start, end, _ in _found(self._acts, text))
        purposes = [(start, end, "") for start, end, _ in _found(self._purposes, text)] if self._purposes else []
        return [*((start, end, "" if number else norm.instead) for number, (start, end) in enumerate(acts)), *purposes]


def _apart(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that do not overlap, in order; of two that do, the longer one."""
    kept: list[tuple[int, int]] = []
    for span in sorted(spans, key=lambda one: one[0] - one[1]):
        if all(span[1] <= other[0] or other[1] <= span[0] for other in kept):
            kept.append(span)
    return sorted(kept)


def _found(words: WordList, prompt: str) -> Iterator[tuple[int, int, str]]:
    """Terms in the plain reading, with their places in the prompt."""
    view = next(views(prompt))
    for start, end, term in words.find(view.text):
        yield (*view.span(start, end), term)
