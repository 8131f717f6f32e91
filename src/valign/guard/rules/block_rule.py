"""The block rules as a stage: they come first, cannot be learned, tuned or switched off, and what they match is never rewritten.

What matches is in `valign.policy.block_rules`, which the data builders use as well.
"""

from collections.abc import Collection, Sequence

from valign.guard.records import Verdict
from valign.policy import BlockRule, BlockRules, Policy


class BlockRuleStage:
    """All block rules of a policy (its key ``always_block``)."""

    name = "hard-rule"  # as in every record that was written so far
    level = "rule"

    def __init__(self, rules: Sequence[BlockRule]) -> None:
        self._rules = BlockRules(rules)

    @classmethod
    def from_policy(cls, policy: Policy) -> "BlockRuleStage":
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

    def check_many(self, prompts: Sequence[str]) -> list[Verdict]:
        return [self.check(prompt) for prompt in prompts]

    def concerns(self, prompt: str) -> bool:
        """Whether a rule would block the prompt if another stage found one of the rule's categories in it."""
        return self._rules.concerns(prompt)
