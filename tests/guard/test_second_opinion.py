"""A listed term counts unless the head is sure of the opposite; nothing else can clear it, and a failing head never does."""

from dataclasses import dataclass, field

import pytest
from guard_stand_ins import with_guard

from valign.guard import Guard, LexicalStage, Verdict
from valign.guard.hard_rule import HardRule
from valign.guard.lexical import Term
from valign.guard.second_opinion import SecondOpinion
from valign.guard.values import ValuesStage
from valign.policy import BlockRule, load_policy

WORDS = LexicalStage([Term("gore", "shocking"), Term("noose", "self-harm")])
RULE = BlockRule(id="stand-in", text="stand-in", every=[["apprentice"], ["crossbow"]], with_categories=["shocking"])


@dataclass
class Reader:
    """Gives a harm of its own to the prompts that hold a word."""

    harms: dict[str, float]
    name: str = "learned"
    level: str = "semantic"
    seen: list[str] = field(default_factory=list)

    def check(self, prompt):
        self.seen.append(prompt)
        harm = max((harm for word, harm in self.harms.items() if word in prompt), default=0.0)
        if harm != harm:
            raise RuntimeError("out of order")
        return Verdict(stage=self.name, level=self.level, outcome="fire" if harm > 0.9 else "pass", ranking=harm)

    def check_many(self, prompts):
        return [self.check(prompt) for prompt in prompts]


def stage(harms, doubt=0.02):
    return SecondOpinion(WORDS, Reader(harms), HardRule([RULE]), doubt=doubt)


@pytest.mark.parametrize(("harm", "outcome"), [(0.0, "pass"), (0.019, "pass"), (0.02, "fire"), (0.5, "fire"), (1.0, "fire")])
def test_only_a_head_that_is_sure_clears_a_term(harm, outcome):
    verdict = stage({"museum": harm}).check("a museum of gore")
    assert (verdict.outcome, verdict.span) == (outcome, (12, 16))
    assert verdict.ranking == (1.0 if outcome == "fire" else harm)
    assert (verdict.score is None) == (outcome == "pass")


def test_without_doubt_a_term_is_final():
    assert stage({}, doubt=0.0).check("gore").fired


def test_only_prompts_with_a_term_are_read():
    opinion = stage({"red": 0.5})
    verdicts = opinion.check_many(["a lamp", "red gore", "a cup", "old gore", "a noose"])
    assert [verdict.fired for verdict in verdicts] == [False, True, False, False, False]
    assert opinion._head.seen == ["red gore", "old gore", "a noose"]


def test_a_word_of_a_block_rule_is_never_cleared():
    opinion = stage({})
    assert opinion.check("an apprentice beside some gore").fired
    assert opinion._head.seen == []


@pytest.mark.parametrize("doubt", [-0.1, 1.1, float("nan")])
def test_doubt_is_a_probability(doubt):
    with pytest.raises(ValueError, match=r"SecondOpinion\.doubt must be in \[0, 1\], got"):
        stage({}, doubt=doubt)


def test_a_head_that_fails_blocks():
    policy = load_policy("default")
    guard = Guard(policy, [stage({"gore": float("nan")})])
    decision = guard.check("gore")
    assert (decision.action, decision.error) == ("block", "lexical: failed: RuntimeError")
    assert guard.check("a lamp").action == "allow"


def test_a_cleared_prompt_still_meets_the_later_stages_and_comes_back_to_the_letter():
    policy = load_policy("default")
    head = Reader({"grim": 0.95})
    rule = HardRule.from_policy(policy)
    guard = Guard(policy, [SecondOpinion(WORDS, head, rule, doubt=0.02), head, ValuesStage.from_policy(policy)])
    result = guard.guard("a gore museum")
    assert (result.action, result.prompt) == ("allow", "a gore museum")
    assert guard.guard(result.prompt).prompt == result.prompt
    assert [one.stage for one in result.decision.trace] == ["hard-rule", "script", "lexical", "learned", "values"]
    assert guard.check("a grim gore museum").stop == "lexical"
    assert guard.check("gore, people dancing and partying on graves in a cemetery").stop == "values"


def test_the_policy_says_how_sure(minilm):
    policy = with_guard(load_policy("default"), stages=["lexical", "learned"])
    assert isinstance(Guard.from_policy(policy, encoder=minilm).stages[0], SecondOpinion)
    assert isinstance(Guard.from_policy(with_guard(policy, doubt=0.0), encoder=minilm).stages[0], LexicalStage)
    assert isinstance(Guard.from_policy(with_guard(policy, stages=["lexical"])).stages[0], LexicalStage)


def test_more_terms_never_let_more_through():
    """Monotone, as the card asks: whatever the head says, a longer list finds at least what a shorter one and the head found."""
    prompts = ["gore", "a rose", "a noose and a rose", "red rose", "a lamp"]
    for harm in (0.0, 0.01, 0.5, 0.95):
        head = Reader({"rose": harm, "gore": 0.5})
        few, more = (
            SecondOpinion(LexicalStage([Term(word, "shocking") for word in words]), head, HardRule([]), doubt=0.02)
            for words in (("gore",), ("gore", "rose", "noose"))
        )
        for prompt in prompts:
            before = few.check(prompt).fired or head.check(prompt).fired
            assert more.check(prompt).fired or head.check(prompt).fired or not before
