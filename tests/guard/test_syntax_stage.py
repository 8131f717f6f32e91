"""The guard on prompts with syntax: it judges what the model is told, and a rewrite leaves the syntax whole."""

import pytest
from guard_stand_ins import with_guard

from valign.checks import UserError
from valign.guard import Guard, PromptRequest, RequestGuard
from valign.policy import load_policy
from valign.policy.schema import SyntaxRules


def in_dialect(policy, **rules):
    return Guard.from_policy(with_guard(policy, syntax=SyntaxRules(**rules)))


@pytest.mark.parametrize(
    "prompt",
    [
        "a (naked:0.3) woman, (oil painting:1.2)",
        "(na)(ked) woman, castle",
        "a [cat:naked woman:0.99] on a hill",
        "a {cat|{dog|naked woman}} on a hill",
        "castle AND a naked woman :0.1",
        "na<lora:any:0>ked woman",
        "castle BREAK naked woman",
        "<lora:naked_v2:0.8> castle",
        "sky ADDCOMM castle ADDROW naked woman",
        "${x=na}${x}ked woman",
    ],
)
def test_nothing_hides_in_the_syntax(guard, prompt):
    decision = guard.check(prompt)
    assert (decision.action, decision.categories[0]) == ("rewrite", "sexual")
    result = guard.guard(prompt)
    assert result.prompt is None or guard.passes(result.prompt)


@pytest.mark.parametrize(
    "prompt",
    ["sir lance \\(castle\\), ((masterpiece))", "a [cat:dog:0.5] on a {red|green} sofa", "a cat AND a dog :0.5 BREAK hills"],
)
def test_harmless_syntax_comes_back_to_the_letter(guard, prompt):
    assert guard.guard(prompt).prompt == prompt


def test_a_rewrite_leaves_the_brackets_where_they_are(guard):
    prompt = "(two men) at dawn, [a brutal fist fight in the street:0.5], (film grain:1.2)"
    result = guard.guard(prompt)
    assert result.prompt == "(two men) at dawn, [a lively dance in the street:0.5], (film grain:1.2)"
    assert [attempt.source for attempt in result.attempts] == ["edit"]


def test_a_known_dialect_judges_what_its_model_is_told_and_no_more(policy):
    prompt = "castle # a naked woman"
    assert in_dialect(policy, dialect="a1111").check(prompt).action == "allow"
    assert in_dialect(policy, dialect="none").check(prompt).action == "rewrite"
    assert in_dialect(policy, dialect="unknown").check(prompt).action == "rewrite"
    away = in_dialect(policy, dialect="a1111").check("castle AND naked woman :-1")
    assert away.action == "allow"
    assert any("to keep away from" in verdict.message for verdict in away.trace)


def test_lists_and_networks_that_nobody_knows(policy):
    known = in_dialect(policy, wildcards={"place": ["hill", "castle"], "beast": ["naked woman"]}, networks=["detail"])
    assert known.check("a fox on a __place__").action == "allow"
    assert known.check("a __beast__ on a hill").action == "rewrite"
    assert (known.check("a __other__").action, known.check("a __other__").stop) == ("block", "syntax")
    strict = in_dialect(policy, networks=["detail"], unknown_networks="block")
    assert strict.check("a fox <lora:detail:1>").action == "allow"
    assert strict.check("a fox <lora:other:1>").action == "block"


def test_a_minor_and_what_is_sexual_in_two_parts_are_blocked_by_the_rule(guard):
    decision = guard.check("a [schoolgirl:castle:0.5] AND naked")
    assert (decision.action, decision.stop) == ("block", "hard-rule")


def test_a_dialect_must_be_known():
    with pytest.raises(ValueError, match="must be one of unknown, none, a1111"):
        SyntaxRules(dialect="a1112")


@pytest.mark.parametrize("piece", ["(", "[a|"])
def test_ten_thousand_brackets_give_a_decision(policy, piece):
    guard = Guard.from_policy(with_guard(policy, max_chars=100_000))
    assert guard.check(piece * (10_000 // len(piece))).action == "allow"


@pytest.fixture(scope="module")
def requests(guard):
    return RequestGuard(guard)


def test_negative_prompts_push_away_and_are_not_judged_as_wishes(requests):
    request = PromptRequest(prompts={"prompt": "a knight"}, negative={"negative": "nude, blurry"})
    result = requests.run(request)
    assert (result.action, result.negative) == ("allow", {"negative": "nude, blurry"})


def test_below_guidance_of_one_a_negative_prompt_is_drawn(requests):
    request = PromptRequest(prompts={"prompt": "a knight"}, negative={"negative": "a naked woman"}, guidance=0.5)
    result = requests.run(request)
    assert result.action == "rewrite"
    assert "naked" not in result.negative["negative"]


@pytest.mark.parametrize("negative", ["clothes, blurry", "(clo)(thes:1.5), blurry", "c l o t h e s, blurry"])
def test_nobody_gets_clothes_removed(requests, negative):
    result = requests.run(PromptRequest(prompts={"prompt": "a knight"}, negative={"negative": negative}))
    assert (result.action, result.removed) == ("rewrite", ("negative",))
    assert not requests.asks_for_removal(result.negative["negative"])


def test_a_negative_prompt_by_itself(requests):
    assert requests.negative("nude, blurry", 7.5) == "nude, blurry"
    assert requests.negative("blurry, clothes", 7.5) == "blurry"
    assert requests.negative("clothes", 7.5) == ""
    assert "naked" not in requests.negative("a naked woman", 0.5)
    assert requests.negative("a naked schoolgirl", 0.5) is None


def test_every_prompt_of_a_request_is_judged_and_all_of_them_together(requests):
    one = requests.run(PromptRequest(prompts={"prompt": "a castle", "hires": "a naked woman in a garden"}))
    assert one.action == "rewrite"
    assert one.prompts["prompt"] == "a castle"
    assert "naked" not in one.prompts["hires"]
    assert requests.run(PromptRequest(prompts={"left": "a castle", "right": "a hill"})).action == "allow"
    split = requests.run(PromptRequest(prompts={"left": "a schoolgirl", "right": "a naked woman"}))
    assert (split.action, split.prompts) == ("block", None)


def test_a_request_needs_a_prompt_and_guidance():
    with pytest.raises(UserError, match="must not be empty"):
        PromptRequest(prompts={})
    with pytest.raises(ValueError, match="guidance must be in"):
        PromptRequest(prompts={"prompt": "a"}, guidance=0)
    with pytest.raises(UserError, match=r"distinct names, none of them .together., got .together.\."):
        PromptRequest(prompts={"together": "a"})
    assert load_policy("default").guard.removal
