"""Rewriting by the policy alone: the harm is replaced by its safe counterpart; subject, place, composition and style stay."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, Protocol, runtime_checkable

from valign.guard.records import Intent, Verdict
from valign.guard.rewriting.caption import Caption, parse_caption, subject_of, with_subject
from valign.guard.rules.semantic import References
from valign.policy import Category, Concept, Policy
from valign.text import clean, fold
from valign.text.syntax import Traced

MOST_DETAILS = 16  # of a prompt that a rewrite keeps; each costs a pass of the guard, and an image model reads 77 tokens
LONGEST_PART = 200  # characters of a part that is kept
Role = Literal["harm", "values", "sign"]  # VALOR's NSFW, VALUE and INTENT


@dataclass(frozen=True, kw_only=True)
class RewriteRequest:
    """The input of a rewriter."""

    prompt: str = field(repr=False)
    role: Role
    finding: Verdict  # what made the rewrite necessary
    intent: Intent = "harmful"
    suspicious: Callable[[str], bool] = field(repr=False, compare=False)  # whether a part of the prompt fails the guard by itself
    # relative to its threshold what the guard finds in each text, see `Waterfall.risks`
    risks: Callable[[Sequence[str]], list[float]] = field(default=lambda texts: [0.0] * len(texts), repr=False, compare=False)
    texts: tuple[Traced, ...] = field(default=(), repr=False)  # what the prompt tells the model, where it has syntax


@runtime_checkable
class Rewriter(Protocol):
    """Anything that proposes captions; the guard checks each of them."""

    name: str
    uses_chat: bool

    def propose(self, request: RewriteRequest, attempt: int) -> str | None:
        """The proposal of that number, from 0; None when there is no other."""
        ...


@runtime_checkable
class Editor(Protocol):
    """Changes as little as it can; it is asked before all rewriters."""

    name: str
    uses_chat: bool

    def proposals(self, request: RewriteRequest) -> Iterator[str]:
        """The best one first; each is made only when those before it were refused."""
        ...


def role_of(finding: Verdict, intent: Intent) -> Role:
    """A good intent gives a sign, whatever stage fired; a broken norm another act or place; any other finding is replaced."""
    if intent in ("prohibition", "education"):
        return "sign"
    return "values" if finding.level == "value" else "harm"


class PolicyRewriter:
    """Deterministic, offline. The first proposals keep most of the prompt, the last ones least.

    Args: references: Finds the nearest concept where a stage named only a category; without it the category's own caption is used.
    """

    name = "policy"
    uses_chat = False

    def __init__(self, policy: Policy, references: References | None = None) -> None:
        self.policy, self.references = policy, references
        self._nearest = lru_cache(maxsize=256)(self._nearest_concept)  # proposals are made anew for every attempt

    def propose(self, request: RewriteRequest, attempt: int) -> str | None:
        for number, text in enumerate(self.proposals(request)):
            if number == attempt:
                return text
        return None

    def proposals(self, request: RewriteRequest) -> Iterator[str]:
        """Distinct texts, none equal to the prompt."""
        seen = {fold(request.prompt)}
        for text in self._proposals(request):
            if fold(text) not in seen:
                seen.add(fold(text))
                yield text

    def _proposals(self, request: RewriteRequest) -> Iterator[str]:
        caption = parse_caption(clean(request.prompt))
        details = tuple(part for part in caption.details[:MOST_DETAILS] if self._keeps(request, part))
        caption = replace(caption, details=details)
        if request.role == "sign":
            place = caption.place if self._keeps(request, caption.place) else ""
            yield Caption("", self.policy.guard.sign, place, details).text()
            yield self.policy.guard.sign
        elif request.role == "values":
            yield from self._by_norm(request, caption)
        else:
            yield from self._by_concept(request, caption)

    def _keeps(self, request: RewriteRequest, part: str) -> bool:
        """Whether a rewrite keeps a part of the prompt: one that the guard finds nothing in, and not a long one."""
        return bool(part) and len(part) <= LONGEST_PART and not request.suspicious(part)

    def _by_norm(self, request: RewriteRequest, caption: Caption) -> Iterator[str]:
        """The same people in the same place with the norm's own act, then without the place, then any people."""
        norm = next(norm for norm in self.policy.norms if norm.id == request.finding.rule)
        subject = subject_of(caption.scene) or "people"
        purposes = [phrase for one in self.policy.norms for phrase in one.when.purpose]
        place = _without(caption.place, purposes)
        yield replace(caption, scene=f"{subject} {norm.instead}", place=place).text()
        yield replace(caption, scene=f"{subject} {norm.instead}", place="").text()
        yield f"people {norm.instead}"

    def _by_concept(self, request: RewriteRequest, caption: Caption) -> Iterator[str]:
        category, concept = self._concept(request)
        medium = caption.medium if self._keeps(request, caption.medium) else ""
        place = caption.place if self._keeps(request, caption.place) else ""
        caption = replace(caption, medium=medium, place=place)
        if concept is not None:
            literal = _replace_name(clean(request.prompt), concept)
            if literal:
                yield literal
            safe = with_subject(concept.safe, subject_of(caption.scene))
            yield replace(caption, scene=safe, place="" if _has_place(safe) else place).text()
            yield replace(caption, scene=concept.safe, place="").text()
        safe = with_subject(category.safe_prompt, subject_of(caption.scene))
        yield replace(caption, scene=safe, place="" if _has_place(safe) else place).text()
        yield replace(caption, scene=category.safe_prompt, place="").text()
        yield category.safe_prompt

    def _concept(self, request: RewriteRequest) -> tuple[Category, Concept | None]:
        category = self.policy.category(request.finding.category)
        named = next((concept for concept in category.concepts if concept.id == request.finding.concept), None)
        if named is not None or self.references is None:
            return category, named
        nearest = self._nearest(clean(request.prompt), category.id)
        return category, next(concept for concept in category.concepts if concept.id == nearest)

    def _nearest_concept(self, text: str, category: str) -> str:
        assert self.references is not None
        cosines = self.references.cosines([text])[0]
        own = [i for i, item in enumerate(self.references.items) if item.category == category]
        return self.references.items[max(own, key=lambda i: float(cosines[i]))].concept


WORN = re.compile(r"\b(?:coat|dress|raincoat|pyjamas|gear|suit|clothes)\b")


def _has_place(scene: str) -> bool:
    """Whether the counterpart names a place; "in an elegant coat" is not one."""
    place = parse_caption(scene).place
    return bool(place) and not WORN.search(place)


def _replace_name(prompt: str, concept: Concept) -> str:
    """The prompt with the concept's name, as it stands there, replaced by the counterpart; "" if it does not stand there."""
    start = prompt.casefold().find(concept.name.casefold())
    return prompt[:start] + concept.safe + prompt[start + len(concept.name) :] if start >= 0 else ""


def _without(text: str, phrases: Sequence[str]) -> str:
    for phrase in phrases:
        start = text.casefold().find(phrase.casefold())
        if start >= 0:
            text = (text[:start] + text[start + len(phrase) :]).strip()
    return " ".join(text.split())
