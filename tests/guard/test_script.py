"""Prompts in letters that word lists cannot read: how many, and what the verdict says."""

import pytest

from valign.guard import Verdict
from valign.guard.rules.script import SHARE, ScriptStage, foreign_share
from valign.policy import load_policy


@pytest.mark.parametrize(("text", "share"), [("", 0), ("123", 0), ("abcd", 0), ("abcж", 0.25), ("жжжж", 1), ("aɏɐɐ", 0.5)])
def test_share_by_hand(text, share):  # ɏ is U+024F, the last Latin letter; ɐ is U+0250
    assert foreign_share(text) == share


def test_a_verdict_says_share_and_threshold():
    stage = ScriptStage(load_policy("default"))
    plain, few, many = stage.check_many(["a cat", "four letters and ж", "большой мир"])
    assert (plain.outcome, plain.score, plain.threshold) == ("pass", None, None)
    assert (few.outcome, few.score, few.threshold) == ("pass", pytest.approx(1 / 15), SHARE)
    assert (many.stage, many.level, many.outcome, many.action) == ("script", "rule", "fire", "block")
    assert (many.threshold, many.message) == (SHARE, "letters that this policy cannot read")


@pytest.mark.parametrize("action", ["block", "allow"])
def test_every_field_and_the_share_itself_fires(action):
    policy = load_policy("default")
    policy = policy.model_copy(update={"guard": policy.guard.model_copy(update={"other_scripts": action})})
    plain, few, many = ScriptStage(policy).check_many(["a cat", "abcdefgh\u0436\u0436", "abcdefg\u0436\u0436\u0436"])
    rule = {"stage": "script", "level": "rule"}
    assert plain == Verdict(**rule)
    assert few == Verdict(**rule, score=0.2, threshold=0.3)
    fired = {"outcome": "fire", "message": "letters that this policy cannot read", "action": "block"}
    assert many == Verdict(**rule, score=0.3, threshold=0.3, **(fired if action == "block" else {}))
