"""The rule that is never learnt, tested in neutral words: a stand-in rule, and the bundled rule on innocent prompts."""

import hashlib
from dataclasses import dataclass

import pytest
from guard_stand_ins import Judge, StandIn, with_guard

from valign.guard import Guard, Verdict
from valign.guard.rules.block_rule import BlockRuleStage
from valign.policy import BlockRule, load_policy
from valign.policy.block_rules import youngest

RULE = BlockRule(
    id="stand-in",
    text="stand-in",
    every=[["apprentice", "novice"], ["crossbow", "catapult"]],
    ages_below=18,
    with_categories=["violence"],
)


@pytest.mark.parametrize(
    "prompt",
    [
        "an apprentice with a crossbow",
        "a crossbow beside the NOVICE",
        "an apprent1ce with a cr0ssbow",
        "a n o v i c e near a catapult",
        "a no\u3164vice near a cata\u2800pult",
        "a\u115fnovice\u115fnear\u115fa\u115fcatapult",
        "a no\u2011vice near a cata\u2013pult",
        "a 15 year old with a catapult",
        "a 15-year-old with a catapult",
        "somebody aged twelve and a crossbow",
        "a 9 yo, catapult",
        "turning sixteen, crossbow",
        "six months old, crossbow",
    ],
)
def test_a_word_of_every_list_blocks(prompt):
    verdict = BlockRuleStage([RULE]).check(prompt)
    assert (verdict.outcome, verdict.action, verdict.rule) == ("fire", "block", "stand-in")
    assert verdict.span is None


@pytest.mark.parametrize(
    "prompt",
    [
        "an apprentice with a lamp",
        "a crossbow on a wall",
        "a 25 year old with a crossbow",
        "a crossbow from 1415",
        "aged 18, crossbow",
    ],
)
def test_one_list_alone_does_not(prompt):
    assert not BlockRuleStage([RULE]).check(prompt).fired


def test_a_finding_of_another_stage_counts_as_the_other_list():
    rule = BlockRuleStage([RULE])
    assert rule.check("an apprentice in a brawl", ["violence"]).fired
    assert not rule.check("a carpenter in a brawl", ["violence"]).fired
    assert not rule.check("an apprentice in a brawl", ["hate"]).fired


@pytest.mark.parametrize(
    ("text", "age"), [("a man aged 40 and a child aged 7", 7), ("turned 17", 17), ("3 days old", 0), ("in 1999", None), ("", None)]
)
def test_youngest(text, age):
    assert youngest(text) == age


@pytest.mark.parametrize(
    "innocent",
    [
        "a girl reading under a tree",
        "students in front of a school",
        "a boy and his dog",
        "a school of fish",
        "children building a sandcastle",
        "a baby elephant",
        "a 12 year old chess champion",
        "a family portrait with two daughters",
    ],
)
def test_minors_alone_stay_innocent(guard, innocent):
    decision = guard.check(innocent)
    assert (decision.action, decision.prompt) == ("allow", innocent)


def test_the_bundled_rule_lists_both_sides():
    rule = next(rule for rule in load_policy("default").always_block if rule.id == "minors-sexual")
    assert len(rule.every) == 2
    assert rule.ages_below == 18
    assert rule.with_categories == ["sexual"]


def test_a_blocked_prompt_leaves_only_its_hash(policy):
    guard = Guard.from_policy(policy.model_copy(update={"always_block": [RULE]}))
    prompt = "an apprentice with a crossbow"
    result = guard.guard(prompt)
    assert result.prompt is None
    assert result.attempts == ()
    assert result.decision.stop == "hard-rule"
    assert result.decision.prompt == ""
    assert result.decision.prompt_sha256 == hashlib.sha256(prompt.encode()).hexdigest()
    shown = f"{result!r} {result.to_json(with_prompt=True)}"
    assert "apprentice" not in shown
    assert "crossbow" not in shown


def test_a_word_of_the_first_list_with_a_finding_blocks_instead_of_rewriting(policy):
    guard = Guard.from_policy(policy.model_copy(update={"always_block": [RULE]}))
    assert guard.check("a carpenter in a brawl").action == "rewrite"
    decision = guard.check("an apprentice in a brawl")
    assert (decision.action, decision.stop, decision.prompt) == ("block", "hard-rule", "")


@pytest.mark.parametrize("action", ["rewrite", "block", "allow"])
@pytest.mark.parametrize("prompt", ["an apprentice in a brawl, smoking heroin", "an apprentice smoking heroin after a brawl"])
def test_the_finding_may_be_any_of_several_and_allowed(policy, prompt, action):
    """Whichever category fires first, and whatever the policy makes of it, the rule sees the other one as well."""
    changed = [one.model_copy(update={"action": action}) if one.id == "violence" else one for one in policy.categories]
    guard = Guard.from_policy(policy.model_copy(update={"always_block": [RULE], "categories": changed}))
    assert guard.check(prompt).stop == "hard-rule"
    assert guard.check(prompt.replace("apprentice", "carpenter")).stop == "lexical"
    assert not guard.passes("an apprentice in a brawl")


@pytest.mark.parametrize("explain", [False, True])
def test_after_a_block_rule_nothing_else_sees_the_prompt(policy, explain):
    """A privacy promise: also where all stages are to be shown, no stage, judge or chat model gets to read it."""
    calls = []
    stages = [StandIn("words", "word", True, calls), StandIn("meaning", "semantic", True, calls)]
    guard = Guard(policy.model_copy(update={"always_block": [RULE]}), stages, judge=Judge("harmful", calls))
    blocked, foreign, other = guard.check_many(
        ["an apprentice with a crossbow", "Привет, большой мир", "a carpenter"], explain=explain
    )
    assert [one.stage for one in blocked.trace] == ["hard-rule"]
    assert [one.stage for one in foreign.trace] == ["hard-rule", "script"]
    assert calls == (["words", "meaning", "judge"] if explain else ["words", "judge"])  # of the third prompt alone
    assert other.stop == "words"


def test_the_finding_may_be_of_a_stage_behind_the_one_that_fired(policy):
    stages = [StandIn("first", "value", True), StandIn("second", "semantic", True)]  # the first finds no category
    guard = Guard(policy.model_copy(update={"always_block": [RULE]}), stages)
    assert guard.check("an apprentice").stop == "hard-rule"
    assert guard.check("a carpenter").stop == "first"


def test_every_field_of_both_verdicts(policy):
    stage = BlockRuleStage.from_policy(policy.model_copy(update={"always_block": [RULE]}))
    assert (stage.name, stage.level) == ("hard-rule", "rule")
    hit, miss = stage.check_many(["an apprentice with a crossbow", "an apprentice with a lamp"])
    message = "a rule that allows no rewrite"
    assert hit == Verdict(stage="hard-rule", level="rule", outcome="fire", rule="stand-in", action="block", message=message)
    assert miss == Verdict(stage="hard-rule", level="rule")
    assert stage.check("an apprentice", ["hate", "violence"]) == hit
    assert [stage.concerns(prompt) for prompt in ("an apprentice", "a carpenter")] == [True, False]


@dataclass
class Suspects(StandIn):
    """Passes or finds hate, with what the prompt could be as well."""

    likely: tuple = ()
    possible: tuple = ()

    def check(self, prompt):
        outcome = "fire" if self.fires else "pass"
        return Verdict(
            stage=self.name, level=self.level, outcome=outcome, category="hate", likely=self.likely, possible=self.possible
        )


@pytest.mark.parametrize(
    ("stages", "blocked"),
    [
        ([Suspects("one", "semantic", False, likely=("violence",))], True),  # nothing found, but the limit of its own is reached
        ([Suspects("one", "semantic", False, possible=("violence",))], False),
        ([Suspects("one", "semantic", True, possible=("violence",))], True),  # found as hate: the low limit counts
        ([Suspects("one", "semantic", True, possible=("sexual",))], False),
        ([StandIn("first", "value", True), Suspects("two", "semantic", False, possible=("violence",))], True),  # a later stage
        ([Suspects("one", "semantic", False, possible=("violence",)), StandIn("two", "value", True)], True),
    ],
)
def test_the_rule_asks_what_the_prompt_could_be_before_anything_is_rewritten(policy, stages, blocked):
    guard = Guard(policy.model_copy(update={"always_block": [RULE]}), stages)
    result = guard.guard("an apprentice")
    assert (result.decision.stop == "hard-rule") == blocked
    assert not blocked or (result.prompt, result.attempts, result.decision.prompt) == (None, (), "")
    assert guard.check("a carpenter").stop != "hard-rule"
    if not any(stage.fires for stage in stages):
        assert guard.passes("an apprentice") != blocked


def test_a_norm_about_sexual_acts_counts_as_sexual():
    guard = Guard.from_policy(with_guard(load_policy("default"), stages=["values"]))
    assert guard.check("a woman pole dancing in a museum").categories == ("sexual",)
    assert guard.check("a student pole dancing in a museum").stop == "hard-rule"
    assert guard.check("a woman brawling in a museum").categories == ()
