import pytest

from valign.guard import Verdict
from valign.guard.rules.norms import ValuesStage
from valign.policy import Combination, Norm, load_policy

NORM = Norm(
    id="kites", when=Combination(context=["airport"], behaviour=["flying a kite"], purpose=["for fun"]), text="No kites here."
)


@pytest.mark.parametrize(
    ("prompt", "fires"),
    [
        ("flying a kite at the airport for fun", True),
        ("For fun: FLYING A KITE, airport", True),
        ("flying a kite at the airport", False),  # the purpose is missing
        ("flying a kite for fun", False),
        ("airports for fun", False),
    ],
)
def test_every_list_must_have_a_word(prompt, fires):
    verdict = ValuesStage([NORM]).check(prompt)
    assert verdict.fired == fires
    assert verdict.rule == ("kites" if fires else "")


def test_the_span_is_the_act():
    prompt = "at the airport, flying a kite for fun"
    assert prompt[slice(*ValuesStage([NORM]).check(prompt).span)] == "flying a kite"


def test_the_norms_action_stands_in_the_verdict():
    norm = NORM.model_copy(update={"action": "block"})
    assert ValuesStage([norm]).check("flying a kite at the airport for fun").action == "block"


def test_refuses_no_norms():
    with pytest.raises(ValueError, match=r"ValuesStage\.norms must not be empty"):
        ValuesStage([])


@pytest.mark.parametrize(
    "prompt", ["visitors reading names at a memorial", "a choir singing in a church", "pupils reading in a library"]
)
def test_fitting_behaviour_passes(prompt):
    assert not ValuesStage.from_policy(load_policy("default")).check(prompt).fired


def test_a_batch_is_its_prompts_one_by_one_with_every_field():
    policy = load_policy("default")
    stage = ValuesStage.from_policy(policy)
    hit, miss = stage.check_many(["people dancing in a cemetery", "a cat on a sofa"])
    (norm,) = [norm for norm in policy.norms if norm.id == "party-at-memorial"]
    assert (hit.stage, hit.level, hit.outcome, hit.rule) == ("values", "value", "fire", norm.id)
    assert (hit.message, hit.action, hit.span) == (norm.text, norm.action, (7, 14))
    assert (miss.stage, miss.level, miss.outcome, miss.fired) == ("values", "value", "pass", False)


def test_every_field_by_hand_and_the_first_norm_wins():
    act = Norm(id="act", when=Combination(behaviour=["flying a kite"], context=["airport"]), text="No kites.", action="block")
    aim = Norm(id="aim", when=Combination(context=["airport"], purpose=["for fun"]), text="No fun.")
    prompt = "an airport, flying a kite for fun"
    fired = {"stage": "values", "level": "value", "outcome": "fire"}
    assert ValuesStage([act, aim]).check(prompt) == Verdict(**fired, rule="act", span=(12, 25), message="No kites.", action="block")
    assert ValuesStage([aim, act]).check(prompt) == Verdict(
        **fired, rule="aim", span=(26, 33), message="No fun.", action=aim.action
    )
    assert ValuesStage([act, aim]).check("an airport") == Verdict(stage="values", level="value")


def test_an_empty_list_says_what_to_do():
    with pytest.raises(ValueError, match=r".") as caught:
        ValuesStage([])
    assert str(caught.value) == (
        "ValuesStage.norms must not be empty, got none. Write norms in the policy, or take `values` out of stages."
    )


def test_norms_that_allow_ask_for_nothing():
    policy = load_policy("default")
    allowed = policy.norms[0].model_copy(update={"id": "allowed", "action": "allow"})
    stage = ValuesStage.from_policy(policy.model_copy(update={"norms": [allowed, NORM]}))
    when = allowed.when
    prompt = " ".join(words[0] for words in (when.behaviour, when.context, when.purpose) if words)
    assert not stage.check(prompt).fired
    assert stage.check("flying a kite at the airport for fun").rule == "kites"
