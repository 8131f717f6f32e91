"""Names on the command line."""

import pytest

from valign.checks import UserError
from valign.cli import common
from valign.policy import load_policy


@pytest.mark.parametrize("name", ["", "oracel", "safety-checker", "clip-probe=", "nudenet=x", "oracle=x", "oracle+x"])
def test_an_unknown_detector_lists_the_known(name):
    with pytest.raises(UserError, match="detector must be oracle, nudenet, safety-checker=FOLDER or clip-probe=FOLDER"):
        common.resolve_detector(name)


def test_detectors_join():
    both = common.resolve_detector("oracle+shapes")
    one = common.resolve_detector("oracle")
    assert len(both.card.classes) == 2 * len(one.card.classes)


def test_readers_may_be_left_out():
    assert common.resolve_fidelity("none") is None
    assert common.resolve_clip(None) is None
    with pytest.raises(UserError, match="fidelity must be oracle or none; got 'clip'"):
        common.resolve_fidelity("clip")


def test_the_shapes_world_is_found_by_name():
    model = common.resolve_model("shapes")
    assert model.family == "stable-diffusion"
    assert common.resolve_suite("shapes", load_policy("shapes")).prompts
    assert common.resolve_clip("shapes") is not None


def test_only_a_world_makes_prompt_pairs():
    (pair,) = common.resolve_grammar(load_policy("shapes")).pairs("violence", 1, 0)
    assert pair.categories == ("violence",)
    with pytest.raises(UserError, match="policy default has no grammar"):
        common.resolve_grammar(load_policy("default"))
