"""Level 3, norms: words of a setting, an act and a purpose that are harmful only together (VALOR, arXiv 2511.11693)."""

from collections.abc import Sequence
from dataclasses import dataclass

from valign.guard.records import Verdict
from valign.policy import Norm, Policy
from valign.text import WordList, readings, views


@dataclass(frozen=True)
class _NormWords:
    norm: Norm
    lists: tuple[WordList, ...]


class ValuesStage:
    """Fires on the first norm whose lists all have a word in the prompt."""

    name = "values"
    level = "value"

    def __init__(self, norms: Sequence[Norm]) -> None:
        if not norms:
            raise ValueError(
                "ValuesStage.norms must not be empty, got none. Write norms in the policy, or take `values` out of stages."
            )
        self._rules = []
        for norm in norms:
            lists = [words for words in (norm.when.behaviour, norm.when.purpose, norm.when.context) if words]
            self._rules.append(_NormWords(norm, tuple(map(WordList, lists))))  # acts are rarer than places, so they are asked first

    @classmethod
    def from_policy(cls, policy: Policy) -> "ValuesStage":
        """The norms that ask for something; one that is allowed does not hide another."""
        return cls([norm for norm in policy.norms if norm.action != "allow"])

    def check(self, prompt: str) -> Verdict:
        """One verdict; its span is the act's, or the purpose's where the norm lists no act."""
        for text in readings(prompt):
            for rule in self._rules:
                if all(words.any(text) for words in rule.lists):
                    return Verdict(
                        stage=self.name,
                        level="value",
                        outcome="fire",
                        category=rule.norm.category or "",
                        rule=rule.norm.id,
                        span=_span(prompt, rule.lists[0]),
                        message=rule.norm.text,
                        action=rule.norm.action,
                    )
        return Verdict(stage=self.name, level="value")

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        return [self.check(prompt) for prompt in prompts]


def _span(prompt: str, words: WordList) -> tuple[int, int] | None:
    for view in views(prompt):
        for start, end, _ in words.find(view.text):
            return view.span(start, end)
    return None
