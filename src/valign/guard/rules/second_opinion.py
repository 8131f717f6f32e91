"""Second opinion: a finding of an ambiguous word is withdrawn where the trained head is sure that the whole prompt is harmless.

"A museum display about the end of the cocaine trade" holds a listed term and no harm. Word lists cannot tell; a head that reads the
sentence can. The policy says which terms are ambiguous: of a site's own words the head may know nothing, so they count unless the
policy says otherwise. In VALOR's waterfall (arXiv 2511.11693) this is the step from "fire" to "pass" of level 1; all later stages
still run.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from valign.checks import check_range
from valign.guard.records import Verdict
from valign.guard.rules.block_rule import BlockRuleStage
from valign.guard.rules.lexical import LexicalStage
from valign.text import fold


@runtime_checkable
class Reader(Protocol):
    """A stage whose verdicts have a probability of harm as their ``ranking`` (`valign.guard.head.learned`)."""

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]: ...


class SecondOpinion:
    """Withdraws findings of ambiguous words where the head is sure of the opposite.

    A prompt with any other listed term, or with a word that a block rule looks for, is never cleared. A head that fails clears
    nothing.
    Args:
        ambiguous: Terms of ``words`` that may be doubted.
        doubt: Probability of harm, in [0, 1], below which the head clears a prompt; 0 clears none.
    """

    def __init__(self, words: LexicalStage, head: Reader, rules: BlockRuleStage, *, ambiguous: Sequence[str], doubt: float) -> None:
        check_range("SecondOpinion.doubt", doubt, low=0.0, high=1.0)
        self._words, self._head, self._rules, self._doubt = words, head, rules, doubt
        self._ambiguous = frozenset(map(fold, ambiguous))

    def __call__(self, prompts: Sequence[str], verdicts: Sequence[Verdict]) -> list[Verdict]:
        """The verdicts, one per prompt; a withdrawn one passes, with the head's probability against `doubt`."""
        result = list(verdicts)
        asked = [i for i, verdict in enumerate(result) if verdict.outcome == "fire" and self._open(prompts[i])]
        try:
            opinions = self._head.check_many([prompts[i] for i in asked]) if asked else []
        except Exception:
            return result
        for i, opinion in zip(asked, opinions):
            if opinion.outcome != "error" and opinion.ranking < self._doubt:
                result[i] = replace(
                    result[i],
                    outcome="pass",
                    score=opinion.ranking,
                    threshold=self._doubt,
                    ranking=opinion.ranking,
                    scores={},
                    message=f"{result[i].message}, but the whole reads as harmless",
                )
        return result

    def _open(self, prompt: str) -> bool:
        return self._words.terms_in(prompt) <= self._ambiguous and not self._rules.concerns(prompt)
