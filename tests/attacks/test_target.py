"""The system as a whole: what is asked, what comes back, and what it costs."""

import pytest
from red_world import RedJudge, square

from valign.attacks.base import AttackBudget, QueryMeter
from valign.attacks.target import AttackTarget, target_of
from valign.checks import UserError
from valign.evaluation.systems import System
from valign.guard import Guard
from valign.guard.rules.lexical import LexicalStage
from valign.policy import load_policy


@pytest.fixture(scope="module")
def policy():
    return load_policy("shapes")


@pytest.fixture
def meter():
    return QueryMeter(AttackBudget())


def listing_guard(policy, detector=None):
    return Guard(policy, [LexicalStage.from_policy(policy)], detector=detector)


def test_an_unguarded_model_gives_its_image(make_target, meter):
    answer = make_target("man").ask("a man", 3, meter)
    assert (answer.caption, answer.stopped, answer.bypassed) == ("a man", "", True)
    assert (meter.queries, meter.images) == (1, 1)


def test_a_flagged_image_is_not_returned_and_still_counted_as_made(make_target, meter):
    target = make_target("man", check=RedJudge())
    answer = target.ask("a man", 3, meter)
    assert (answer.image, answer.stopped, answer.bypassed) == (None, "image check", False)
    assert target.ask("a boat", 3, meter).image is not None
    assert (meter.queries, meter.images) == (2, 2)


def test_a_rewrite_is_not_a_bypass(policy, make_target, meter):
    answer = make_target("bolt", guard=Guard.from_policy(policy)).ask("a red bolt on the left", 3, meter)
    assert answer.image is not None
    assert "bolt" not in answer.caption
    assert not answer.bypassed


def test_images_of_all_attempts_are_counted_and_none_is_returned_that_the_check_flags(policy, make_target, meter):
    target = make_target("a", guard=listing_guard(policy, RedJudge()))  # every caption has an a
    answer = target.ask("a boat", 3, meter)
    assert (answer.image, answer.stopped) == (None, "image check")
    assert meter.images == 1 + policy.guard.max_regenerations
    assert meter.queries == 1


@pytest.mark.parametrize("prompt", [" ", "a\x00b", "boat " * 10_000])
def test_what_the_guard_does_not_read_is_stopped_by_it(policy, make_target, meter, prompt):
    assert make_target(guard=listing_guard(policy)).ask(prompt, 0, meter).stopped == "guard"


def test_the_copy_of_the_guard_knows_its_words(policy, make_target):
    target = make_target(guard=listing_guard(policy))
    assert {"bolt", "saw"} <= target.listed()
    assert not target.lets_through("a red bolt")
    assert target.lets_through("a red boat")
    assert make_target().listed() == frozenset()
    assert make_target().lets_through("a red bolt")


def test_two_image_checks_are_refused(policy, make_target):
    with pytest.raises(UserError, match="has a guard, which looks at the images itself"):
        make_target(guard=listing_guard(policy), check=RedJudge())


def test_from_outside_there_is_no_inside(tiny_model, tiny_sdxl):
    from valign.models.diffusion.loading import load_model

    system = System("base", lambda prompts, seeds: [square("red") for _ in prompts], fingerprint="f")
    assert target_of(system, name="x", model=tiny_model).white is not None
    outside = target_of(system, name="x", model=tiny_model, inside=False)
    assert outside.white is None
    assert outside.encoder is tiny_model
    two = target_of(system, name="x", model=load_model(str(tiny_sdxl), device="cpu"))
    assert (two.white, two.encoder) == (None, None)


def test_a_check_changes_the_fingerprint():
    system = System("base", lambda prompts, seeds: [], fingerprint="f")
    assert target_of(system, name="x").fingerprint != target_of(system, name="x", check=RedJudge()).fingerprint
    with pytest.raises(UserError, match=r"AttackTarget\.name must be letters"):
        AttackTarget("a/b", lambda caption, seed: square("red"))
