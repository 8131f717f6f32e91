"""The waterfall: which stages are asked, in which order, and what comes of it. Card valor, case 1: sixteen rows."""

from itertools import product

import pytest
from guard_stand_ins import Judge, StandIn

from valign.guard import Guard, Verdict


@pytest.mark.parametrize(("words", "meaning", "value", "good"), list(product([False, True], repeat=4)))
def test_truth_table(policy, words, meaning, value, good):
    calls = []
    stages = [
        StandIn("lexical", "word", words, calls),
        StandIn("semantic", "semantic", meaning, calls),
        StandIn("values", "value", value, calls),
    ]
    rules = policy.model_copy(update={"guard": policy.guard.model_copy(update={"benign_intent": "direct"})})
    decision = Guard(rules, stages, judge=Judge("prohibition" if good else "harmful", calls)).check("a red apple")
    # transcription of the card: L1, then L2 only if L1 did not fire, then L3 only if neither did; the intent only if one fired
    if words:
        expected, stop = ["lexical", "judge"], "lexical"
    elif meaning:
        expected, stop = ["lexical", "semantic", "judge"], "semantic"
    elif value:
        expected, stop = ["lexical", "semantic", "values", "judge"], "values"
    else:
        expected, stop = ["lexical", "semantic", "values"], ""
    assert calls == expected
    assert decision.stop == stop
    fired = words or meaning or value
    assert decision.action == ("rewrite" if fired and not good else "allow")
    assert decision.flagged == (fired and not good)
    assert decision.intent == ("unknown" if not fired else "prohibition" if good else "harmful")


def test_a_good_intent_is_rewritten_as_a_sign_by_default(policy):
    decision = Guard(policy, [StandIn("lexical", "word", True)], judge=Judge("prohibition")).check("a red apple")
    assert (decision.action, decision.flagged) == ("rewrite", False)


@pytest.mark.parametrize("action", ["rewrite", "block"])
def test_a_category_decides_what_becomes_of_it(policy, action):
    categories = [one.model_copy(update={"action": action}) if one.id == "violence" else one for one in policy.categories]
    guard = Guard(policy.model_copy(update={"categories": categories}), [StandIn("lexical", "word", True)])
    assert guard.check("a red apple").action == action


def test_what_the_policy_allows_is_no_finding(policy):
    categories = [one.model_copy(update={"action": "allow"}) if one.id == "violence" else one for one in policy.categories]
    calls = []
    stages = [StandIn("lexical", "word", True, calls), StandIn("values", "value", False, calls)]
    decision = Guard(policy.model_copy(update={"categories": categories}), stages).check("a red apple")
    assert (decision.action, calls) == ("allow", ["lexical", "values"])


@pytest.mark.parametrize("first", ["a brawl of naked men", "naked men in a brawl"])
def test_an_allowed_category_hides_no_other_one(policy, first):
    """One stage finds both; the policy allows violence, and nudity is what is rewritten."""
    categories = [one.model_copy(update={"action": "allow"}) if one.id == "violence" else one for one in policy.categories]
    guard = Guard.from_policy(policy.model_copy(update={"categories": categories}))
    assert guard.check("a brawl").action == "allow"
    decision = guard.check(first)
    assert (decision.action, set(decision.categories)) == ("rewrite", {"violence", "sexual"})
    result = guard.guard(first)
    assert result.rewritten
    assert guard.check(result.prompt).action == "allow"


def test_an_allowed_norm_hides_no_other_one(policy):
    party = policy.norms[0].model_copy(update={"id": "first", "action": "allow"})
    rules = policy.model_copy(update={"norms": [party, party.model_copy(update={"id": "second", "action": "block"})]})
    when = party.when
    prompt = " ".join(words[0] for words in (when.behaviour, when.context, when.purpose) if words)
    assert Guard.from_policy(rules).check(prompt).action == "block"


def test_explain_runs_all_stages_and_decides_the_same(policy):
    calls = []
    stages = [StandIn("lexical", "word", True, calls), StandIn("values", "value", True, calls)]
    decision = Guard(policy, stages).check("a red apple", explain=True)
    assert (calls, decision.stop) == (["lexical", "values"], "lexical")


def test_a_failing_stage_blocks_the_prompt_and_no_other(policy):
    guard = Guard(policy, [StandIn("lexical", "word", False, fails_on="pear")])
    apple, pear = guard.check_many(["a red apple", "a green pear"])
    assert (apple.action, pear.action) == ("allow", "block")
    assert pear.error == "lexical: failed: RuntimeError"
    assert guard.guard("a green pear").prompt is None


@pytest.mark.parametrize(("case", "action"), [("block", "block"), ("rewrite", "rewrite")])
def test_a_failing_judge_follows_the_policy(policy, case, action):
    rules = policy.model_copy(update={"cases": policy.cases.model_copy(update={"judge_failure": case})})
    decision = Guard(rules, [StandIn("lexical", "word", True)], judge=Judge("rubbish", fails=True)).check("a red apple")
    assert decision.action == action
    assert "judge failed" in decision.error


def test_refuses_to_start_without_stages(policy):
    with pytest.raises(ValueError, match=r"Guard\.stages must not be empty"):
        Guard(policy, [])


def test_refuses_two_stages_of_one_name(policy):
    with pytest.raises(ValueError, match="distinct names, got lexical, lexical"):
        Guard(policy, [StandIn("lexical", "word", True), StandIn("lexical", "word", False)])


@pytest.mark.parametrize("numbers", [{"score": float("nan")}, {"threshold": float("inf")}, {"scores": {"hate": float("nan")}}])
def test_a_number_that_is_not_finite_is_a_check_that_failed(policy, numbers, monkeypatch):
    stage = StandIn("learned", "semantic", False)
    monkeypatch.setattr(stage, "check", lambda prompt: Verdict(stage="learned", level="semantic", **numbers))
    decision = Guard(policy, [stage]).check("a red apple")
    assert (decision.action, decision.error) == ("block", "learned: failed: a score is not finite")


def test_a_judge_without_a_number_does_not_excuse(policy, monkeypatch):
    judge = Judge("prohibition")
    excused = Verdict(stage="judge", level="intention", rule="prohibition", score=float("nan"))
    monkeypatch.setattr(judge, "judge", lambda prompt, findings: excused)
    decision = Guard(policy, [StandIn("lexical", "word", True)], judge=judge).check("a red apple")
    assert (decision.action, decision.intent) == ("block", "harmful")
