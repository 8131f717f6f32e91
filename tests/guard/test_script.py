"""Prompts in letters that word lists cannot read: how many, and what the verdict says."""

import pytest

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
