"""A listed term counts unless the head is sure of the opposite; nothing else can clear it, and a failing head never does."""

from dataclasses import dataclass, field

import pytest
from guard_stand_ins import with_guard

from valign.guard import Guard, LexicalStage, Verdict
from valign.guard.rules.block_rule import BlockRuleStage
from valign.guard.rules.lexical import Term
from valign.guard.rules.norms import ValuesStage
from valign.guard.rules.second_opinion import SecondOpinion
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


def asked(harms, prompts, *, ambiguous=("Gore", "noose"), doubt=0.02):
    """The word level's verdicts after the opinion, and what the head was asked."""
    head = Reader(harms)
    opinion = SecondOpinion(WORDS, head, BlockRuleStage([RULE]), ambiguous=ambiguous, doubt=doubt)
    return opinion(prompts, WORDS.check_many(prompts)), head.seen


def guarded(head, *words, stages=()):
    """A guard of a word list, a head and further stages."""
    policy = load_policy("default")
    listed = LexicalStage([Term(word, "shocking") for word in words])
    opinion = SecondOpinion(listed, head, BlockRuleStage.from_policy(policy), ambiguous=words, doubt=0.02)
    return Guard(policy, [listed, head, *stages], opinion=opinion)


@pytest.mark.parametrize(("harm", "outcome"), [(0.0, "pass"), (0.019, "pass"), (0.02, "fire"), (0.5, "fire"), (1.0, "fire")])
def test_only_a_head_that_is_sure_clears_a_term(harm, outcome):
    [verdict], _ = asked({"museum": harm}, ["a museum of gore"])
    assert (verdict.outcome, verdict.span) == (outcome, (12, 16))
    assert (verdict.score, verdict.threshold) == ((1.0, 1.0) if outcome == "fire" else (harm, 0.02))
    assert verdict.ranking == verdict.score


def test_without_doubt_a_term_is_final():
    assert asked({}, ["gore"], doubt=0.0)[0][0].fired


def test_only_prompts_with_a_term_are_read():
    verdicts, seen = asked({"red": 0.5}, ["a lamp", "red gore", "a cup", "old gore", "a noose"])
    assert [verdict.fired for verdict in verdicts] == [False, True, False, False, False]
    assert seen == ["red gore", "old gore", "a noose"]


def test_a_word_of_a_block_rule_is_never_cleared():
    verdicts, seen = asked({}, ["an apprentice beside some gore"])
    assert verdicts[0].fired
    assert seen == []


def test_a_term_that_is_not_ambiguous_is_final_and_so_is_its_company():
    verdicts, seen = asked({}, ["gore", "g o r e", "a noose", "a noose and gore"], ambiguous=["gore"])
    assert [verdict.fired for verdict in verdicts] == [False, False, True, True]
    assert seen == ["gore", "g o r e"]


@pytest.mark.parametrize("doubt", [-0.1, 1.1, float("nan")])
def test_doubt_is_a_probability(doubt):
    with pytest.raises(ValueError, match=r"SecondOpinion\.doubt must be in \[0, 1\], got"):
        asked({}, ["gore"], doubt=doubt)


def test_a_head_that_fails_clears_nothing():
    guard = guarded(Reader({"gore": float("nan")}), "gore")
    assert guard.check("gore").stop == "lexical"
    assert guard.check("gore").flagged
    assert guard.check("a lamp").action == "allow"


def test_a_cleared_prompt_still_meets_the_later_stages_and_comes_back_to_the_letter():
    guard = guarded(Reader({"grim": 0.95}), "gore", stages=[ValuesStage.from_policy(load_policy("default"))])
    result = guard.guard("a gore museum")
    assert (result.action, result.prompt) == ("allow", "a gore museum")
    assert guard.guard(result.prompt).prompt == result.prompt
    assert [one.stage for one in result.decision.trace] == ["hard-rule", "script", "lexical", "learned", "values"]
    assert guard.check("a grim gore museum").stop == "lexical"
    assert guard.check("gore, people dancing and partying on graves in a cemetery").stop == "values"


def test_the_policy_says_which_terms_and_how_sure(minilm):
    policy = with_guard(load_policy("default"), stages=["lexical", "learned"])
    assert Guard.from_policy(policy, encoder=minilm).opinion is not None
    assert Guard.from_policy(with_guard(policy, ambiguous=[]), encoder=minilm).opinion is None
    assert Guard.from_policy(with_guard(policy, stages=["lexical"])).opinion is None
    listed = LexicalStage.from_policy(policy)
    assert {term for term in policy.guard.ambiguous if not listed.terms_in(term)} == set()


def test_more_terms_never_let_more_through():
    """Monotone, as the card asks: whatever the head says, a longer list flags at least what a shorter one does."""
    for harm in (0.0, 0.01, 0.5, 0.95):
        head = Reader({"rose": harm, "gore": 0.5})
        few, more = guarded(head, "gore"), guarded(head, "gore", "rose", "noose")
        for prompt in ("gore", "a rose", "a noose and a rose", "red rose", "a lamp"):
            assert more.check(prompt).flagged or not few.check(prompt).flagged


def test_every_field_of_a_withdrawn_finding():
    [found] = WORDS.check_many(["a museum of gore"])
    [withdrawn], _ = asked({"museum": 0.01}, ["a museum of gore"])
    assert withdrawn == Verdict(
        stage="lexical",
        level="word",
        outcome="pass",
        category="shocking",
        span=(12, 16),
        score=0.01,
        threshold=0.02,
        ranking=0.01,
        message="a listed term of shocking, but the whole reads as harmless",
    )
    assert asked({"museum": 0.02}, ["a museum of gore"])[0] == [found]


def test_the_ends_of_doubt_are_allowed():
    assert asked({"gore": 0.99}, ["gore"], doubt=1.0)[0][0].outcome == "pass"
    assert asked({"gore": 1.0}, ["gore"], doubt=1.0)[0][0].outcome == "fire"
    assert asked({"gore": 0.0}, ["gore"], doubt=0.0)[0][0].outcome == "fire"


class Broken:
    """A head whose verdicts are errors, or that cannot be asked at all."""

    def __init__(self, outcome=None):
        self.outcome = outcome

    def check_many(self, prompts):
        if self.outcome is None:
            raise RuntimeError("out of order")
        return [Verdict(stage="learned", level="semantic", outcome=self.outcome) for _ in prompts]


@pytest.mark.parametrize("head", [Broken(), Broken("error")])
def test_neither_an_error_nor_an_exception_clears(head):
    opinion = SecondOpinion(WORDS, head, BlockRuleStage([RULE]), ambiguous=["gore"], doubt=0.5)
    found = WORDS.check_many(["a cat", "gore"])
    assert opinion(["a cat", "gore"], found) == found
    assert opinion(["a cat"], found[:1]) == found[:1]
    cleared = SecondOpinion(WORDS, Broken("fire"), BlockRuleStage([RULE]), ambiguous=["gore"], doubt=0.5)(["gore"], found[1:])
    assert [verdict.outcome for verdict in cleared] == ["pass"]  # the probability counts, not what the head makes of it


def test_several_prompts_get_the_opinion_on_themselves():
    verdicts, _ = asked({"red": 0.9, "old": 0.01}, ["red gore", "a cat", "old gore", "red noose", "old noose"])
    assert [verdict.outcome for verdict in verdicts] == ["fire", "pass", "pass", "fire", "pass"]
    assert [verdict.ranking for verdict in verdicts] == [1.0, 0.0, 0.01, 1.0, 0.01]
