"""The waterfall (VALOR, arXiv 2511.11693): stages in order, cheap before dear, stop at the first that fires, then ask the intent.

==========================  ==============  ===========================================
what fired                  intent          action
==========================  ==============  ===========================================
nothing                     not asked       allow
a stage                     good            allow (``direct``) or rewrite as a sign
a stage                     bad             what the rule or the category asks: rewrite, block
a stage failed              not asked       block
==========================  ==============  ===========================================
"""

from collections.abc import Sequence

from valign.guard.records import Intent, Verdict
from valign.policy import Action, Policy

GOOD: tuple[Intent, ...] = ("prohibition", "education")


def ignored(policy: Policy, verdict: Verdict) -> bool:
    """A finding that the policy allows: its rule or its category says so."""
    return verdict.outcome == "fire" and action_of(policy, verdict) == "allow"


def action_of(policy: Policy, verdict: Verdict) -> Action:
    """What the rule asks for, else the category; an unknown category is rewritten."""
    if verdict.action is not None:
        return verdict.action
    known = {category.id: category.action for category in policy.categories}
    return known.get(verdict.category, "rewrite")


def action_for(policy: Policy, finding: Verdict, intent: Intent) -> Action:
    """The table above, for a finding that counts."""
    if finding.outcome == "error":
        return "block"
    if finding.level == "rule":
        return finding.action or "block"
    if intent in GOOD:
        if policy.guard.benign_intent == "direct":
            return "allow"
        return policy.cases.negated
    return action_of(policy, finding)


def categories_of(trace: Sequence[Verdict]) -> tuple[str, ...]:
    """Categories of the findings and of all scores above their stage's threshold, the most certain first."""
    found: dict[str, float] = {}
    for verdict in trace:
        if verdict.outcome == "fire" and verdict.category:
            found[verdict.category] = max(found.get(verdict.category, 0.0), verdict.score or 0.0)
    return tuple(sorted(found, key=lambda name: -found[name]))
