"""Requests of several texts: prompts per pass, region or encoder, and negative prompts, judged by the role that each has.

A negative prompt is subtracted where guidance is above 1 and mixed in below 1: there it is judged as a prompt.
Above, it must not ask for the removal of what protects ("clothes"): `guard.removal` lists such words, and they are taken out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from valign.checks import UserError, check_range
from valign.guard.guard import Guard
from valign.guard.records import GuardDecision, GuardResult
from valign.guard.rewriting.changes import changed, tidy
from valign.policy import Action
from valign.text import WordList, fold, readings, views
from valign.text.syntax import has_syntax

TOGETHER = "together"  # name of all prompts of a request, read as one
SEVERITY: tuple[Action, ...] = ("allow", "rewrite", "block")


@dataclass(frozen=True, kw_only=True)
class PromptRequest:
    """Every text that reaches the model, by the name of its field. Raises: UserError without one, or if guidance is 0 or less."""

    prompts: Mapping[str, str]
    negative: Mapping[str, str] = field(default_factory=dict)
    guidance: float = 7.5  # classifier-free guidance scale

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError("PromptRequest.prompts must not be empty, got none. Name at least one field with its text.")
        names = [TOGETHER, *self.prompts, *self.negative]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(
                f"PromptRequest must have fields of distinct names, none of them {TOGETHER!r}, got {twice[0]!r}. Rename it."
            )
        check_range("PromptRequest.guidance", self.guidance, above=0.0, hint="At 0 or less the negative prompt is what is drawn.")


@dataclass(frozen=True, kw_only=True)
class RequestResult:
    """What may be generated from: every field's text, or None where the request is blocked."""

    action: Action
    prompts: Mapping[str, str] | None = field(repr=False)
    negative: Mapping[str, str] | None = field(repr=False)
    results: Mapping[str, GuardResult]  # by field; `TOGETHER` is all prompts at once
    removed: tuple[str, ...] = ()  # negative fields from which words that ask for a removal were taken


class RequestGuard:
    """Guards whole requests with one guard."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        words = guard.policy.guard.removal
        self._removal = WordList(words) if words else None

    def check(self, request: PromptRequest) -> dict[str, GuardDecision]:
        """A decision per prompt, per negative prompt that is drawn, and for all prompts together if there are several. Raises: as
        `Guard.check`."""
        texts = dict(request.prompts)
        if request.guidance < 1.0:
            texts |= {name: text for name, text in request.negative.items() if text.strip()}
        if len(request.prompts) > 1:
            texts[TOGETHER] = ", ".join(text for text in request.prompts.values() if text.strip())
        return dict(zip(texts, self.guard.check_many(list(texts.values()))))

    def run(self, request: PromptRequest) -> RequestResult:
        """Every text as it may be generated from. Harm that only all prompts together have is blocked. Raises: as `check`."""
        decisions = self.check(request)
        texts = {**request.prompts, **request.negative}
        results = {name: self.guard.finish(decisions[name], texts[name]) for name in decisions if name != TOGETHER}
        prompts = {name: results[name].prompt for name in request.prompts}
        negative = {name: results[name].prompt if name in results else text for name, text in request.negative.items()}
        if TOGETHER in decisions and decisions[TOGETHER].action != "allow":
            whole = ", ".join(text or "" for text in prompts.values())
            blocked = not self.guard.passes(whole) if whole.strip(", ") else True
            results[TOGETHER] = GuardResult(decision=decisions[TOGETHER], prompt=None if blocked else whole)
        removed = tuple(name for name, text in negative.items() if text and self.asks_for_removal(text))
        safe = {
            name: self.without_removal(text) if name in removed else text for name, text in negative.items() if text is not None
        }
        worst = max((result.action for result in results.values()), key=SEVERITY.index)
        worst = max((worst, "rewrite" if removed else "allow"), key=SEVERITY.index)
        if worst == "block":
            return RequestResult(action="block", prompts=None, negative=None, results=results, removed=removed)
        shown = {name: text for name, text in prompts.items() if text is not None}
        return RequestResult(action=worst, prompts=shown, negative=safe, results=results, removed=removed)

    def negative(self, text: str, guidance: float) -> str | None:
        """One negative prompt as it may be used; None where it must not be. Raises: as `Guard.check`, if it is judged."""
        if guidance < 1.0 and text.strip():
            judged = self.guard.guard(text).prompt
            if judged is None:
                return None
            text = judged
        return self.without_removal(text) if self.asks_for_removal(text) else text

    def asks_for_removal(self, negative: str) -> bool:
        """Whether a negative prompt holds a word of `guard.removal`, in any spelling and whatever its syntax."""
        if self._removal is None:
            return False
        texts = [one.text for one in self.guard.told(negative)] if has_syntax(negative) else [negative]
        return any(self._removal.any(reading) for text in texts for reading in readings(text))

    def without_removal(self, negative: str) -> str:
        """The negative prompt without these words; nothing of it where they cannot be cut out one by one."""
        if self._removal is None:
            return negative
        view = next(views(negative))
        spans = [(*view.span(start, end), "") for start, end, _ in self._removal.find(view.text)]
        text = tidy(changed(negative, spans))
        return "" if not fold(text) or self.asks_for_removal(text) else text
