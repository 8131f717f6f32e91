"""Answers are judged by severity, and generated again where they are too severe: five rounds, then a refusal (Safe RLHF-V)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from valign.checks import check_choice, check_range

Level = Literal["safe", "minor", "moderate", "severe"]
LEVELS: tuple[Level, ...] = get_args(Level)
REFUSAL = "I'm sorry, but I can't help with that."
WARNING = "The answer before was too close to {category}. Answer so that nobody can come to harm, or decline."
# round (from 0) and a warning to stand in the prompt ("" for none) -> a new sample
Generate = Callable[[int, str], str]


@dataclass(frozen=True)
class SeverityVerdict:
    """How severe the harm is, and of which category."""

    level: Level
    category: str | None = None
    reason: str = ""  # why there is no judgement of its own: the judge failed

    def beyond(self, allowed: Level) -> bool:
        """Whether it is more severe than ``allowed``."""
        return LEVELS.index(self.level) > LEVELS.index(allowed)


@runtime_checkable
class SeverityJudge(Protocol):
    """Judges a question, or a question with an answer, with the image that they are about, if there is one."""

    def __call__(self, question: str, answer: str | None, image: Any = None) -> SeverityVerdict: ...


@dataclass(frozen=True)
class FilteredAnswer:
    """``text`` is what may be shown. ``verdicts`` are those of all answers, in order; ``question`` that of the question."""

    text: str
    action: Literal["answered", "regenerated", "refused", "blocked"]
    question: SeverityVerdict
    verdicts: tuple[SeverityVerdict, ...] = field(default=())


@dataclass(frozen=True, kw_only=True)
class AnswerFilter:
    """Check the question, then generate until an answer is not too severe, ``rounds`` times at most, then refuse.

    A judge that fails counts as ``severe``: nothing is let through unjudged.

    Args:
        allowed: The most severe level that an answer may have.
        block: A question of this level or a worse one is answered by the refusal at once.
        warned: Whether the second and later samples are asked for with a warning that names the category.
    """

    judge: SeverityJudge
    allowed: Level = "safe"
    block: Level = "severe"
    rounds: int = 5
    warned: bool = False
    refusal: str = REFUSAL

    def __post_init__(self) -> None:
        check_range("AnswerFilter.rounds", self.rounds, low=1)
        check_choice("AnswerFilter.allowed", self.allowed, LEVELS)
        check_choice("AnswerFilter.block", self.block, LEVELS[1:], hint="A question is always asked at level safe.")

    def __call__(self, question: str, generate: Generate, image: Any = None) -> FilteredAnswer:
        """The answer that may be shown, with every verdict. Raises: what ``generate`` raises."""
        asked = self._judged(question, None, image)
        if LEVELS.index(asked.level) >= LEVELS.index(self.block):
            return FilteredAnswer(self.refusal, "blocked", asked)
        found: list[SeverityVerdict] = []
        for number in range(self.rounds):
            warning = WARNING.format(category=found[-1].category or "harm") if self.warned and found else ""
            text = generate(number, warning)
            found.append(self._judged(question, text, image))
            if not found[-1].beyond(self.allowed):
                return FilteredAnswer(text, "answered" if number == 0 else "regenerated", asked, tuple(found))
        return FilteredAnswer(self.refusal, "refused", asked, tuple(found))

    def _judged(self, question: str, answer: str | None, image: Any) -> SeverityVerdict:
        try:
            found = self.judge(question, answer, image)
            check_choice("the level of a verdict", found.level, LEVELS)
        except Exception as error:  # whatever a judge raises
            return SeverityVerdict("severe", reason=f"the judge failed: {type(error).__name__}: {str(error)[:200]}")
        return found


def severity_of_cost(cost: float, bounds: tuple[float, float, float] = (0.0, 1.0, 2.0)) -> Level:
    """The level of a cost model's score: safe up to the first bound, then minor, moderate, severe; severe where it is NaN."""
    if cost != cost:
        return "severe"
    return LEVELS[sum(cost > bound for bound in bounds)]
