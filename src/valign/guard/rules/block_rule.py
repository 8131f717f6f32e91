"""The rules that come before every stage and cannot be learnt, tuned or switched off: what they match is blocked, never rewritten.

What matches is in `valign.policy.block_rules`, which the data builders use as well.
"""

from collections.abc import Collection, Sequence

from valign.guard.records import Verdict
from valign.policy import BlockRule, BlockRules, Policy


class HardRule:
    """All ``always_block`` rules of a policy."""

    name = "hard-rule"
    level = "rule"

    def __init__(self, rules: Sequence[BlockRule]) -> None:
        self._rules = BlockRules(rules)

    @classmethod
    def from_policy(cls, policy: Policy) -> "HardRule":
        return cls(policy.always_block)

    def check(self, prompt: str, findings: Collection[str] = ()) -> Verdict:
        """Fires if a rule matches in any reading of the prompt. ``findings``: categories that other stages found.

        The verdict has no span: nothing of such a prompt is kept but its hash.
        """
        rule = self._rules.match(prompt, findings)
        if rule is None:
            return Verdict(stage=self.name, level="rule")
        message = "a rule that allows no rewrite"
        return Verdict(stage=self.name, level="rule", outcome="fire", rule=rule.id, action="block", message=message)

    def concerns(self, prompt: str) -> bool:
        """Whether a rule would block the prompt, had another stage found enough in it."""
        return self._rules.concerns(prompt)
