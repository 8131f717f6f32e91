"""The waterfall (VALOR, arXiv 2511.11693): stages in order, cheapest first, stop at the first that fires, then ask the intent.

==========================  ==============  ===========================================
what fired                  intent          action
==========================  ==============  ===========================================
nothing                     not asked       allow
a stage                     good            allow (``direct``) or rewrite as a sign
a stage                     bad             what the rule or the category asks: rewrite, block
a stage failed              not asked       block
a chat judge failed         not asked       ``cases.judge_failure``, block by default
==========================  ==============  ===========================================
"""

from collections.abc import Sequence
from dataclasses import replace

from valign.guard.records import Intent, Verdict
from valign.policy import Action, Policy

GOOD: tuple[Intent, ...] = ("prohibition", "education")


def ignored(policy: Policy, verdict: Verdict) -> bool:
    """A finding that the policy allows: its rule or every category in it says so. Of failures, only a chat judge's."""
    return verdict.fired and action_of(policy, verdict) == "allow"


def action_of(policy: Policy, verdict: Verdict) -> Action:
    """What the rule asks for, else the category; an unknown category is rewritten."""
    if verdict.action is not None:
        return verdict.action
    known = {category.id: category.action for category in policy.categories}
    return known.get(enforced(policy, verdict).category, "rewrite")


def enforced(policy: Policy, verdict: Verdict) -> Verdict:
    """The finding, about the first of its categories that the policy does not allow: an allowed one hides no other."""
    allowed = {category.id for category in policy.categories if category.action == "allow"}
    if verdict.category not in allowed:
        return verdict
    other = next((name for name in verdict.also if name not in allowed), None)
    return verdict if other is None else replace(verdict, category=other, concept="")


def action_for(policy: Policy, finding: Verdict, intent: Intent) -> Action:
    """The table above, for a finding that counts."""
    if finding.outcome == "error":
        return finding.action or "block"
    if finding.level == "rule":
        return finding.action or "block"
    if intent in GOOD:
        if policy.guard.benign_intent == "direct":
            return "allow"
        return policy.cases.negated
    return action_of(policy, finding)


def categories_of(trace: Sequence[Verdict]) -> tuple[str, ...]:
    """All categories that were found, the most certain first."""
    found: dict[str, float] = {}
    for verdict in trace:
        if verdict.outcome == "fire" and verdict.category:
            for name in (verdict.category, *verdict.also):
                found[name] = max(found.get(name, 0.0), verdict.scores.get(name, verdict.score or 0.0))
    return tuple(sorted(found, key=lambda name: -found[name]))


def suspected(trace: Sequence[Verdict]) -> tuple[str, ...]:
    """All categories that the prompt could have, for the block rules: found by a stage, or at a stage's low limits.

    A finding of any stage, allowed ones too, makes all count that a stage holds possible.
    """
    found = any(verdict.outcome == "fire" and verdict.level != "rule" for verdict in trace)
    names = [name for verdict in trace for name in (*verdict.likely, *(verdict.possible if found else ()))]
    return tuple(dict.fromkeys((*categories_of(trace), *names)))
